"""What happens at ``loss.backward()``: how the k gradients of a masked weight arrive.

`tapped_module` gives a module with masked weights its class. In known `layers` the gradient is
computed by `masked_grad`; everywhere else `weight_tap` picks it out of the dense one.
"""
