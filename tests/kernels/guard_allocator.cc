// For test_guard.py: preloaded, so that every block that C++ code allocates ends where memory that cannot be accessed
// begins. A read or write past the end, or after the block was freed, ends the process at that instruction, vector and
// tile instructions included, which a sanitizer does not all see.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <new>

namespace {

constexpr std::size_t kPage = 4096, kArena = std::size_t{1} << 38;

std::size_t round_up(std::size_t size, std::size_t multiple) { return (size + multiple - 1) / multiple * multiple; }

char* arena() {
  static char* const base = [] {
    void* p = mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return static_cast<char*>(p);
  }();
  return base;
}

// A page that holds the number of bytes accessible, pages of which the block is the end, a page without access.
void* allocate(std::size_t size, std::size_t alignment) {
  static std::atomic<std::size_t> used{0};
  const std::size_t bytes = round_up(size ? size : 1, alignment), pages = kPage + round_up(bytes, kPage);
  const std::size_t place = used.fetch_add(pages + kPage);
  if (alignment > kPage || place + pages + kPage > kArena) abort();
  char* const block = arena() + place;
  if (mprotect(block, pages, PROT_READ | PROT_WRITE) != 0) abort();
  memset(block + kPage, 0xaa, pages - kPage);
  memcpy(block, &pages, sizeof pages);
  return block + pages - bytes;
}

void release(void* p) {
  if (p == nullptr) return;
  const std::size_t offset = static_cast<std::size_t>(static_cast<char*>(p) - arena());
  if (offset >= kArena) abort();
  char* const block = arena() + offset / kPage * kPage - kPage;
  std::size_t pages;
  memcpy(&pages, block, sizeof pages);
  madvise(block, pages, MADV_DONTNEED);
  mprotect(block, pages, PROT_NONE);
}

}  // namespace

extern "C" void* guarded_bytes(std::size_t size) { return allocate(size, 1); }
extern "C" void* guarded_new(std::size_t size) { return ::operator new(size, std::align_val_t(64)); }
extern "C" void guarded_delete(void* p) { ::operator delete(p, std::align_val_t(64)); }

void* operator new(std::size_t size) { return allocate(size, 16); }
void* operator new[](std::size_t size) { return allocate(size, 16); }
void* operator new(std::size_t size, std::align_val_t a) { return allocate(size, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t size, std::align_val_t a) { return allocate(size, static_cast<std::size_t>(a)); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return allocate(size, 16); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return allocate(size, 16); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, std::size_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { release(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { release(p); }
