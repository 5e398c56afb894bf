// The spectra of weights that are used again without being trained. Free of torch's headers.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "digest.h"
#include "kernels.h"
#include "memory.h"

// Spectra of weights that were used without gradients, with digests of those weights: an address says where
// to look, and only the same content makes an entry valid, since weights may change without any sign of it
// (through `.data`, or by moving). A kernel that finds other content says so by Spectra::stale, and the entry
// is removed.
class SpectraCache {
  public:
    // Read by threads after the lock was given back, and therefore never changed.
    struct Entry {
        const void* address;
        Type type;
        Plan plan;
        std::vector<Digest> digests;
        Floats spectra;
        size_t bytes() const;
    };
    using Held = std::shared_ptr<const Entry>;  // an entry in use outlives its removal
    using Compute = std::function<void(const Images& weight, float* spectra)>;

    // The entry of a weight at this address, for such a plan, or null. It may be stale.
    Held find(const Plan&, const Images& weight);
    Held add(const Plan&, const Images& weight, const Compute&);
    void remove(const Held&);

  private:
    static constexpr size_t LIMIT = 512 << 20;  // bytes; RepLKNet-31B at 224 pixels needs 70 MB
    std::mutex mutex;
    std::list<Held> entries;  // the least recently used last
    size_t total = 0;         // bytes
};
