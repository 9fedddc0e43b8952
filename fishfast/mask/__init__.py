"""Stage 2, masks: from scores or by a baseline's rule, split over workers, kept in files.

What the user calls is in `topk_mask`, `split`, `baselines` and `score_file`; the result is
`sparse_mask`. How the k largest scores are found is in `selection`.
"""
