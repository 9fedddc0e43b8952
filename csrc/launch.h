// What each operation needs, in plain types: no torch, no pybind11, no CUDA headers.
//
// The row structs are mirrored by numpy record types in fishfast/optim/sparse_adam.py,
// fishfast/optim/sparse_sgd.py and fishfast/mask/selection/cuda.py; bindings.cpp publishes their
// sizes and the Python side compares.
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

// A capturable step reads on the device what the host computes otherwise: a small kernel before the
// update counts the step and completes the rows, so a CUDA graph of both can be replayed.

struct LearningRate {
  const void* tensor;  // on the device, fp32 if in_float, else fp64; null: value
  double value;
  int64_t in_float;  // 1: it is an fp32 tensor, and what is computed from it is rounded to fp32
};

struct StepInputs {
  const float* const* grads;  // [num_rows] addresses, on the HOST: they travel with the launch
  const float* found_inf;     // [1] on the device, nonzero: nothing is changed; null: no scaling
  const float* grad_scale;    // [1] on the device, null: 1
};

template <class Row, class Plan>
struct CapturableStep {
  Row* rows;                // [num_rows] on the device; grad and what the plan gives are filled in
  const Plan* plans;        // [num_rows] on the device
  const StepChunk* chunks;  // [num_chunks] on the device
  int64_t num_rows, num_chunks;
};

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
  const float* grad;      // [k]; null on CUDA: the row is skipped
  float* values;          // [k] fp32 masters
  float* exp_avg;         // [k]
  float* exp_avg_sq;      // [k]
  float* max_exp_avg_sq;  // [k], null without amsgrad
  int64_t k;
  AdamScalars scalars;
};

struct AdamPlan {  // what a capturable row's scalars are computed from
  float* step;     // [1] on the device, one more after the step
  LearningRate lr;
  double beta1, beta2;
  double weight_decay;  // the decoupled one, else 0
};

// Updates values and moments in place and writes the rounded values into the weights.
void sparse_adam_cpu(const SparseAdamRow* rows, int64_t num_rows, int num_threads);

// rows and chunks live on the device; nothing is allocated and nothing synchronises.
// Throws std::runtime_error when the launch is refused.
void sparse_adam_cuda(const SparseAdamRow* rows, const StepChunk* chunks, int64_t num_chunks,
                      void* stream);

// The same with everything that changes between steps read on the device. What a CUDA graph that
// captures it keeps are the addresses in `step` and in `inputs`.
void sparse_adam_capturable_cuda(const CapturableStep<SparseAdamRow, AdamPlan>& step,
                                 const StepInputs& inputs, void* stream);

// ---- sparse_sgd -------------------------------------------------------------------------------

struct SgdScalars {
  float negative_lr, momentum, one_minus_dampening, weight_decay;
  float grad_scale, grad_sign;
  int32_t nesterov;
  int32_t first_step;  // 1: the momentum buffer is set to the gradient, as torch.optim.SGD does
};

struct SparseSgdRow {
  ScatterTarget target;
  const float* grad;       // [k]; null on CUDA: the row is skipped
  float* values;           // [k] fp32 masters
  float* momentum_buffer;  // [k], null when momentum is 0
  int64_t k;
  SgdScalars scalars;
};

struct SgdPlan {
  float* step;  // [1] on the device, 0 before the momentum buffer is set; null without momentum
  LearningRate lr;
};

// Updates values and momentum_buffer in place and writes the rounded values into the weights.
void sparse_sgd_cpu(const SparseSgdRow* rows, int64_t num_rows, int num_threads);

// As sparse_adam_cuda.
void sparse_sgd_cuda(const SparseSgdRow* rows, const StepChunk* chunks, int64_t num_chunks,
                     void* stream);

// As sparse_adam_capturable_cuda.
void sparse_sgd_capturable_cuda(const CapturableStep<SparseSgdRow, SgdPlan>& step,
                                const StepInputs& inputs, void* stream);

// ---- write_values -----------------------------------------------------------------------------

struct WriteRow {  // one compact parameter, after a step that another optimizer took
  ScatterTarget target;
  const float* values;  // [k] fp32 masters
  int64_t k;
};

// Writes the rounded values into the weights and nothing else.
void write_values_cpu(const WriteRow* rows, int64_t num_rows, int num_threads);

// ---- fisher_linear ----------------------------------------------------------------------------

struct FisherOperand {  // element (row, column) is data[rows[row] + columns[column]]
  const float* data;
  const int64_t* rows;
  const int64_t* columns;
};

struct FisherLinear {
  float* score;           // [num_outputs, num_inputs], added to; rows score_stride apart
  FisherOperand grad;     // [num_rows, num_outputs]
  FisherOperand x;        // [num_rows, num_inputs]
  const int64_t* starts;  // [num_samples] first row of each sample
  const int64_t* ends;    // [num_samples] one past its last row
  int64_t num_outputs, num_inputs, num_samples, score_stride;
  int power;  // 2: squares; 1: absolute values
};

void fisher_linear_cpu(const FisherLinear& call, int num_threads);

struct FisherBlock {  // element (sample, position, column) of one operand, by strides
  const float* data;
  int64_t sample_stride, position_stride, column_stride;
};

// Samples of one length, whose rows of zeros at the end are left out; the bias too, if there is
// one.
struct FisherLinearBlocks {
  float* score;       // as above
  float* bias_score;  // [columns of the bias's operand], added to; null: none
  FisherBlock grad, x;
  bool bias_of_x;  // whether the bias goes with x, where the weight is stored transposed
  int64_t num_outputs, num_inputs, num_samples, num_positions, score_stride;
  int power;
};

void fisher_linear_blocks_cpu(const FisherLinearBlocks& call, int num_threads);

// ---- fisher_sum -------------------------------------------------------------------------------

struct FisherSum {
  float* score;            // [num_features], of grad (x - mean) rstd; null: none
  float* bias_score;       // [num_features], of grad; null: none
  FisherBlock grad, x;     // column_stride 1; x with data null: 1
  FisherBlock mean, rstd;  // column_stride 0; data null: 0 and 1
  int64_t num_samples, num_positions, num_features;
  int power;
};

void fisher_sum_cpu(const FisherSum& call, int num_threads);

// ---- masked_grad ------------------------------------------------------------------------------

struct MaskedGrad {
  float* out;           // [k]
  const void* left;     // [num_samples, num_rows], samples left_stride apart
  const void* right;    // [num_samples, num_columns], samples right_stride apart
  const void* indices;  // [k] int32 or int64, ascending: row * num_columns + column
  int64_t k, num_samples, num_rows, num_columns;
  int64_t left_stride, right_stride;
  Storage storage;       // of left and right
  int32_t wide_indices;  // 1 if indices are int64
};

// out[e] = sum_t left[t, row_e] * right[t, column_e]
void masked_grad_cpu(const MaskedGrad& call, int num_threads);

struct MaskedTokenGrad {
  float* out;             // [k] zeros
  const void* grad;       // [num_tokens, num_columns], tokens grad_stride apart
  const int64_t* tokens;  // [num_tokens] rows of the weight
  const void* indices;    // [k] int32 or int64, ascending: row * num_columns + column
  int64_t k, num_tokens, num_rows, num_columns;
  int64_t grad_stride;
  int64_t padding;       // the row whose gradient is zero, or -1
  Storage storage;       // of grad
  int32_t wide_indices;  // 1 if indices are int64
};

// out[e] = sum over the tokens t of row_e of grad[t, column_e]
void masked_grad_tokens_cpu(const MaskedTokenGrad& call, int num_threads);

// ---- topk_mask --------------------------------------------------------------------------------

struct ScoreTensor {
  const void* data;  // [numel] contiguous, >= 0
  int64_t numel;
  Storage storage;
};

struct BadScore {  // first score that is NaN or negative; (-1, -1) if there is none
  int64_t tensor, index;
};

// The passes of a selection over a list of tensors; each call reads the scores once.
class TopkPasses {
 public:
  TopkPasses(std::vector<ScoreTensor> tensors, int num_threads);

  // Takes the scores whose bits above the digit equal prefix, and adds to counts how many have
  // each value of the digit: bits shift to shift + num_bits - 1 of the 31-bit magnitude. The
  // topmost digit (shift + num_bits == 31, prefix 0) also looks for bad scores; with one, counts
  // is left as it was.
  BadScore histogram(int shift, int num_bits, uint32_t prefix, int64_t* counts) const;

  // Counts the scores above the threshold, a bit pattern, and those equal to it.
  void count(uint32_t threshold);
  std::vector<int64_t> greater() const { return per_tensor(&Chunk::greater); }  // [tensors]
  std::vector<int64_t> equal() const { return per_tensor(&Chunk::equal); }      // [tensors]

  // After count: writes, ascending, the indices of the greater scores of every tensor and of its
  // first ties[i] equal ones; outputs[i] has room for them, int64 where wide[i], int32 elsewhere.
  void emit(const std::vector<int64_t>& ties, const std::vector<void*>& outputs,
            const std::vector<bool>& wide) const;

 private:
  struct Chunk {
    int64_t tensor, start;
    int32_t length;
    int32_t greater = 0, equal = 0;
  };
  std::vector<int64_t> per_tensor(int32_t Chunk::* count) const;

  std::vector<ScoreTensor> tensors_;
  std::vector<Chunk> chunks_;
  int num_threads_;
  uint32_t threshold_ = 0;
};

// The selection on a card.
constexpr int64_t kTopkScoresPerTile = 8192;  // what a block of the CUDA kernels takes at a time

struct TopkRow {  // one tensor
  ScoreTensor scores;
  int64_t first_tile;  // tiles of all tensors before it; a tile is of one tensor
};

struct TopkParams {
  const TopkRow* rows;  // [num_tensors], on the device
  int64_t num_tensors, num_tiles;
  int64_t scores_per_tile;   // at most kTopkScoresPerTile; less in tests
  int64_t k;                 // 1 <= k <= number of scores
  int64_t stream_capacity;   // at most so many scores are set aside for a second look
  int64_t max_blocks;        // of a grid; 0: all that the card runs at once
  int64_t max_shared_bytes;  // of a block; 0: all that the card allows
  void* workspace;       // [topk_mask_workspace_bytes()], on the device, aligned to 8; any content
  void* indices;         // [k] out: ascending indices of the first tensor, of the second, ...
  int32_t wide_indices;  // 1 if indices are int64, else int32
  int32_t zero_bits;     // as many low bits are 0 in every score as fp32: 16 if all are bf16
};

struct TopkResult {  // the workspace begins with one, and then the number selected of each tensor
  int64_t bad_tensor, bad_index;  // first score that is NaN or negative, or (-1, -1)
  int64_t num_zero_score;         // selected although the score is 0
};

int64_t topk_mask_workspace_bytes(const TopkParams& params);

// The k largest scores as TopkPasses find them, bit for bit. With a bad score nothing is
// selected. params is read on the host; nothing is allocated and nothing synchronises.
// Throws std::runtime_error when a launch is refused.
void topk_mask_cuda(const TopkParams& params, void* stream);

}  // namespace fishfast
