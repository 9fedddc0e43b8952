// What each operation needs, in plain types: no torch, no pybind11, no CUDA headers.
//
// The row structs are mirrored by numpy record types in fishfast/sparse_adam.py and
// fishfast/sparse_sgd.py; bindings.cpp publishes their sizes and the Python side compares.
#pragma once
#include <cstdint>
#include <vector>

#include "storage.h"

namespace fishfast {

// Where the compact values of one masked weight go after a step.
struct ScatterTarget {
  void* weight;          // storage of the weight; null for a parameter that is not masked
  const void* offsets;   // [k] int32 or int64, unique: position of each entry in that storage
  Storage storage;       // dtype of the weight
  int32_t wide_offsets;  // 1 if offsets are int64
};

// ---- optimizers on CUDA -----------------------------------------------------------------------

struct StepChunk {  // what one block works on
  int64_t start;    // first entry within the row
  int64_t row;
};
constexpr int64_t kEntriesPerStepChunk = 1024;

// ---- sparse_adam ------------------------------------------------------------------------------

struct AdamScalars {  // all in fp32, rounded once from Python's doubles
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;               // 1 - lr * weight_decay when it is decoupled, else 1
  float negative_step_size;  // -lr / (1 - beta1^t)
  float bias_correction2_sqrt;
  float grad_scale;  // divides the gradient (a loss scale), 1 if there is none
  float grad_sign;   // -1 to maximize
  float l2_penalty;  // weight decay of Adam, added to the gradient; 0 when it is decoupled
};

struct SparseAdamRow {  // one compact parameter; a table of rows is one launch
  ScatterTarget target;
  const float* grad;      // [k]
  float* values;          // [k] fp32 masters
  float* exp_avg;         // [k]
  float* exp_avg_sq;      // [k]
  float* max_exp_avg_sq;  // [k], null without amsgrad
  int64_t k;
  AdamScalars scalars;
};

// Updates values and moments in place and writes the rounded values into the weights.
void sparse_adam_cpu(const SparseAdamRow* rows, int64_t num_rows, int num_threads);

// rows and chunks live on the device; nothing is allocated and nothing synchronises.
// Throws std::runtime_error when the launch is refused.
void sparse_adam_cuda(const SparseAdamRow* rows, const StepChunk* chunks, int64_t num_chunks,
                      void* stream);

// ---- sparse_sgd -------------------------------------------------------------------------------

struct SgdScalars {
  float negative_lr, momentum, one_minus_dampening, weight_decay;
  float grad_scale, grad_sign;
  int32_t nesterov;
  int32_t first_step;  // 1: the momentum buffer is set to the gradient, as torch.optim.SGD does
};

struct SparseSgdRow {
  ScatterTarget target;
  const float* grad;       // [k]
  float* values;           // [k] fp32 masters
  float* momentum_buffer;  // [k], null when momentum is 0
  int64_t k;
  SgdScalars scalars;
};

// Updates values and momentum_buffer in place and writes the rounded values into the weights.
void sparse_sgd_cpu(const SparseSgdRow* rows, int64_t num_rows, int num_threads);

// As sparse_adam_cuda.
void sparse_sgd_cuda(const SparseSgdRow* rows, const StepChunk* chunks, int64_t num_chunks,
                     void* stream);

// ---- fisher_linear ----------------------------------------------------------------------------

struct FisherLinear {
  float* score;           // [num_outputs, num_inputs], added to; rows score_stride apart
  const float* grad;      // [num_rows, num_outputs], rows grad_stride apart
  const float* x;         // [num_rows, num_inputs], rows x_stride apart
  const int64_t* starts;  // [num_samples] first row of each sample
  const int64_t* ends;    // [num_samples] one past its last row
  int64_t num_outputs, num_inputs, num_rows, num_samples;
  int64_t score_stride, grad_stride, x_stride;
  int power;  // 2: squares; 1: absolute values
};

void fisher_linear_cpu(const FisherLinear& call, int num_threads);

// ---- topk_mask --------------------------------------------------------------------------------

struct ScoreTensor {
  const void* data;  // [numel] contiguous, >= 0
  int64_t numel;
  Storage storage;
};

// The k largest scores of all tensors together; ties go to the lowest (tensor, index).
class TopkSelection {
 public:
  // Reads the scores (1 <= k <= number of scores) and finds the threshold.
  TopkSelection(std::vector<ScoreTensor> tensors, int64_t k, int num_threads);

  // First score that is NaN or negative: (tensor, index), or (-1, -1). With one, nothing is
  // selected.
  int64_t bad_tensor() const { return bad_tensor_; }
  int64_t bad_index() const { return bad_index_; }

  const std::vector<int64_t>& num_selected() const { return num_selected_; }  // per tensor
  int64_t num_zero_score() const { return num_zero_score_; }  // selected although the score is 0

  // Writes the ascending indices of every tensor; outputs[i] has num_selected()[i] elements, int64
  // where wide[i] and int32 elsewhere.
  void emit(const std::vector<void*>& outputs, const std::vector<bool>& wide) const;

 private:
  struct Chunk {
    int64_t tensor, start, length;
    int64_t first_output = 0;  // position of the chunk's first entry in its tensor's output
    int64_t ties = 0;          // how many of its scores equal to the threshold are taken
  };
  void cut_into_chunks();
  bool find_threshold(int64_t k);
  void count_per_chunk();

  std::vector<ScoreTensor> tensors_;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> num_selected_;
  int num_threads_;
  uint32_t threshold_ = 0;  // bit pattern of the k-th largest score
  int64_t num_ties_ = 0;    // how many scores equal to it are taken
  int64_t num_zero_score_ = 0;
  int64_t bad_tensor_ = -1, bad_index_ = -1;
};

}  // namespace fishfast
