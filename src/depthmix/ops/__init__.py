"""The arithmetic of depth mixing: ``reference`` reads like the papers, ``eager`` is fast without a compiler."""

import torch

# The vector library behind torch on a CPU chooses its code for the processor when a function is first called. Where
# two threads were first at the same moment, one has now and then been seen to take a coarser one, with errors far
# beyond rounding. One number is not shared among threads.
for _function in (torch.exp, torch.log, torch.tanh, torch.sin, torch.cos):
    _function(torch.ones(1))
