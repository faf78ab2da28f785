// The C interface, for ctypes. Functions that can fail return 0, or a code with the message that
// `baton_error` gives to the same thread; no exception leaves them. One model is used by one thread
// at a time. Structures and numbers are those of model.h; baton/native/library.py mirrors them.

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "tile.h"

namespace {

thread_local std::string last_error;

enum Code : int32_t { kDone = 0, kInvalid = 1, kNoMemory = 2, kFailed = 3 };

template <typename Body>
int32_t guarded(Body&& body) noexcept {
  try {
    body();
    return kDone;
  } catch (const std::invalid_argument& error) {
    last_error = error.what();
    return kInvalid;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return kNoMemory;
  } catch (const std::exception& error) {
    last_error = error.what();
    return kFailed;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Grows with every change of this interface: a stale library must not be called.
int32_t baton_interface() { return 3; }

// Whether the kernel lets this process use what the library needs. To be called first.
int32_t baton_ready() { return baton::tiles_ready(); }

const char* baton_error() { return last_error.c_str(); }

// Why a shape does not fit the operations; empty when it does. Valid until the thread's next call.
const char* baton_why_not(const baton::ModelShape* shape) {
  last_error = baton::Model::why_not(*shape);
  return last_error.c_str();
}

// `windows` [layers]; `cpus` [num_cpus], empty: threads are not pinned.
int32_t baton_model_new(const baton::ModelShape* shape, const int64_t* windows, int32_t threads,
                        const int32_t* cpus, int32_t num_cpus, baton::Model** model) {
  return guarded([&] {
    *model = new baton::Model(*shape, windows, threads, std::vector<int>(cpus, cpus + num_cpus));
  });
}

void baton_model_free(baton::Model* model) { delete model; }

int32_t baton_model_load(baton::Model* model, int32_t weight, int64_t layer, const void* source,
                         int64_t values) {
  return guarded([&] { model->load(static_cast<baton::Weight>(weight), layer, source, values); });
}

int32_t baton_model_forward(baton::Model* model, const baton::Batch* batch,
                            const baton::PoolView* pool, int64_t begin, int64_t end, float* logits,
                            int64_t stride, int64_t* best) {
  return guarded([&] { model->forward(*batch, *pool, begin, end, logits, stride, best); });
}

// What was counted since the last call.
void baton_model_profile(baton::Model* model, baton::Profile* profile) {
  *profile = model->take_profile();
}

}  // extern "C"
#pragma GCC visibility pop
