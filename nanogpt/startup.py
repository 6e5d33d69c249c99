"""What keeps torch from importing its compiler (torch._dynamo) in a process that compiles nothing: two seconds.

`tests/test_startup.py` holds the stages to it. Two more places are one line each: determinism.py sets deterministic
algorithms by the debug mode, and model.py keeps activation checkpointing out of evaluation.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AdamW(torch.optim.AdamW):
    """torch's AdamW with its methods unwrapped: the wrappers, for torch.compile alone, import the compiler."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class NothingDrawn(TorchFunctionMode):
    """Leaves out the drawing of first weights, for which torch imports the compiler on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
