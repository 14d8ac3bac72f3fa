"""Small video diffusion models of one's own domain, trained from scratch on GPUs with little memory."""

import logging

__version__ = "0.1.0"

# What these two report while they are imported concerns other uses of theirs than ours: xformers' compiled extras, 4-bit kernels.
for _chatty in ("xformers", "bitsandbytes"):
    logging.getLogger(_chatty).setLevel(logging.ERROR)
