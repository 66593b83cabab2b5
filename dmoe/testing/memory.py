"""How much memory the tensors of this process take, by what Python can see of them."""

import gc

import torch
from torch import Tensor


def live_bytes() -> int:
    """Return the bytes of all tensors that Python objects hold, each storage once.

    What autograd alone holds, such as activations, is not among them.
    """
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return storage_bytes(tensors + [t.grad for t in tensors if t.is_leaf and t.grad is not None])


def storage_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of the storages of tensors, of which several may share one."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        if local.device.type != "meta" and local.layout == torch.strided:
            storage = local.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
