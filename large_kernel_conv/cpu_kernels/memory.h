// Memory for the kernels: aligned, in large pages where that pays, used again from call to call. Free of
// torch's headers.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <initializer_list>
#include <memory>

// `floats` of memory that large transforms read fast, to be given back with free(); throws std::bad_alloc.
float* allocate(size_t floats);
size_t allocated_bytes(size_t floats);                // of memory that it takes
void advise_large_pages(void* memory, size_t bytes);  // for pages that were not touched yet

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

// A part of an arena's memory, which is used like a pointer to it.
struct Buffer {
    long size;              // floats
    float* data = nullptr;  // until an arena has placed it
    operator float*() const { return data; }
};

// Owns memory that stays for the next use, since mapping pages afresh can take longer than computing.
class Arena {
  public:
    // Gives the buffers memory, one behind the other, uninitialized; it is theirs until the next call.
    void place(std::initializer_list<Buffer*> buffers);

  private:
    Floats memory;
    long size = 0;  // floats
};

// This thread's, for the intermediate results of one task.
Arena& thread_arena();
