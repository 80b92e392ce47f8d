// A fixed block of memory aligned to a cache line, zeroed.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

namespace pruneofa {

template <class T>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(std::size_t count)
      : data_(count ? static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))) : nullptr),
        size_(count) {
    if (count) std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
  }
  Aligned(Aligned&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Aligned& operator=(Aligned&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
  }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace pruneofa
