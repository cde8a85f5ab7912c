"""What is done with weights that are kept in one place and computed with in another, seen without a GPU."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOVES = {"aten::_to_copy", "aten::detach", "aten::alias"}


class Watch(TorchDispatchMode):
    """Sees which operations take weights from where they are kept, and how many bytes of copies live at once.

    Attributes:
        frozen_used: Names of the operations that took frozen weights; on a GPU each of them would be an error.
        trained_used: Of those that took trained ones.
        num_trained: How often a trained weight was copied.
        peak_bytes: The most bytes of copies at once.
    """

    def __init__(self):
        super().__init__()
        self.frozen_used, self.trained_used = set(), set()
        self.num_trained = self.peak_bytes = 0
        self._homes, self._copies = {}, {}

    def homes_of(self, model):
        """Watch the parameters and buffers of a model."""
        self._homes = {
            tensor.untyped_storage()._cdata: tensor.requires_grad for tensor in (*model.parameters(), *model.buffers())
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = {self._homes.get(tensor.untyped_storage()._cdata) for tensor in tensors} - {None}
        for is_trained, used in ((False, self.frozen_used), (True, self.trained_used)):
            if is_trained in found and func._schema.name not in MOVES:
                used.add(func._schema.name)
        result = func(*args, **(kwargs or {}))
        if found and func._schema.name == "aten::_to_copy":
            self.num_trained += True in found
            self._copies[StorageWeakRef(result.untyped_storage())] = result.nbytes
        self._copies = {copy: size for copy, size in self._copies.items() if not copy.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(self._copies.values()))
        return result
