"""The k values of a masked weight: the fp32 `masters`, and their `target` in the weight."""
