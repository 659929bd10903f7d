"""The operators that the tape is made of.

Those of a site, ``read`` and its backward, make their results themselves; the others write into
memory that they are given.
"""

import torch

attend = torch.ops.flash_attn_res.attend_into.default
attend_backward = torch.ops.flash_attn_res.attend_backward_into.default
read = torch.ops.flash_attn_res.read_site.default
read_backward = torch.ops.flash_attn_res.read_site_backward.default
stochastic_add = torch.ops.flash_attn_res.stochastic_add_into.default
quantize = torch.ops.flash_attn_res.quantize_into.default
