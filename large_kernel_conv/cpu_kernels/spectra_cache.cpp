#include "spectra_cache.h"

#include <algorithm>

namespace {

// Whether the spectra of one weight are the same for both plans.
bool same_spectra(const Plan& a, const Plan& b) {
    return a.channels == b.channels && a.geometry == b.geometry && a.cropped == b.cropped &&
           a.row_transform == b.row_transform && a.column_transform == b.column_transform;
}

}  // namespace

size_t SpectraCache::Entry::bytes() const {
    return digests.size() * sizeof(Digest) + allocated_bytes(plan.spectra_size());
}

SpectraCache::Held SpectraCache::find(const Plan& plan, const Images& weight) {
    std::lock_guard lock(mutex);
    for (auto i = entries.begin(); i != entries.end(); i++) {
        const Entry& entry = **i;
        if (entry.address != weight.data || entry.type != weight.type) continue;
        if (!same_spectra(entry.plan, plan)) continue;
        entries.splice(entries.begin(), entries, i);
        return entries.front();
    }
    return nullptr;
}

SpectraCache::Held SpectraCache::add(const Plan& plan, const Images& weight, const Compute& compute) {
    const char* data = (const char*)weight.data;
    std::vector<char> values(data, data + weight.channels * weight.bytes_per_channel());
    Images copy = weight;
    copy.data = values.data();  // another thread may be writing to the weights
    auto entry = std::make_shared<Entry>(
        Entry{data, weight.type, plan, /* digests */ {}, Floats(allocate(plan.spectra_size()))});
    compute(copy, entry->spectra.get());
    for (long group = 0; group < plan.channel_groups(); group++)
        entry->digests.push_back(group_digest(plan, copy, group));
    if (entry->bytes() > LIMIT) return entry;
    std::lock_guard lock(mutex);
    entries.push_front(entry);
    total += entry->bytes();
    while (total > LIMIT) total -= entries.back()->bytes(), entries.pop_back();
    return entry;
}

void SpectraCache::remove(const Held& entry) {
    std::lock_guard lock(mutex);
    auto i = std::find(entries.begin(), entries.end(), entry);
    if (i != entries.end()) total -= entry->bytes(), entries.erase(i);
}
