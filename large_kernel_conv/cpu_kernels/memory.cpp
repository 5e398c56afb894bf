#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace {

// Columns of a map lie on as many pages as it has rows: large pages spare the address translations.
constexpr size_t LARGE_PAGE = 2 << 20;
size_t alignment_of(size_t floats) { return floats * sizeof(float) >= LARGE_PAGE / 2 ? LARGE_PAGE : 64; }

}  // namespace

size_t allocated_bytes(size_t floats) {
    const size_t alignment = alignment_of(floats);
    return (floats * sizeof(float) + alignment - 1) / alignment * alignment;
}

float* allocate(size_t floats) {
    void* memory = std::aligned_alloc(alignment_of(floats), allocated_bytes(floats));
    if (!memory) throw std::bad_alloc();
    if (alignment_of(floats) == LARGE_PAGE) advise_large_pages(memory, allocated_bytes(floats));
    return (float*)memory;
}

void advise_large_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE  // on Linux; where the system refuses, normal pages serve
    const uintptr_t first = ((uintptr_t)memory + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const uintptr_t last = ((uintptr_t)memory + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

void Arena::place(std::initializer_list<Buffer*> buffers) {
    long wanted = 0;
    for (const Buffer* buffer : buffers) wanted += buffer->size;
    if (wanted > size) {
        memory.reset(), size = 0;  // before more is asked for
        memory.reset(allocate(wanted)), size = wanted;
    }
    float* next = memory.get();
    for (Buffer* buffer : buffers) buffer->data = next, next += buffer->size;
}

Arena& thread_arena() {
    static thread_local Arena arena;
    return arena;
}
