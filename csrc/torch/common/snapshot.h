// What a tensor was when something was made of it: as long as it matches, what was made is good.
//
// Every change but a write through `.data` or numpy shows: another storage or place in it, a version counted up. The
// storage is held weakly, so that no other storage can take its address.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace freezekit {

class Snapshot {
 public:
  explicit Snapshot(const at::Tensor& source)
      : storage_(source.storage().getWeakStorageImpl()),
        offset_(source.storage_offset()),
        version_(source._version()),
        dtype_(source.scalar_type()),
        strides_(source.strides().begin(), source.strides().end()) {}

  bool matches(const at::Tensor& source) const {
    return storage_._unsafe_get_target() == source.storage().unsafeGetStorageImpl() && !storage_.expired() &&
           offset_ == source.storage_offset() && version_ == source._version() && dtype_ == source.scalar_type() &&
           source.strides() == at::IntArrayRef(strides_);
  }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  int64_t offset_;
  uint32_t version_;
  at::ScalarType dtype_;
  c10::SmallVector<int64_t, 4> strides_;
};

}  // namespace freezekit
