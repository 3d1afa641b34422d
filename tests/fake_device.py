"""Runs Focal on a device without numbers, as on a GPU: what test_cuda.py starts.

A forward or backward pass fails here if it uses a number that is on the device, for which it would have to wait for a
GPU, or tensors of two devices.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers.initialization import no_init_weights

from focal_hf import FocalForImageClassification
from small_models import tiny

# A CPU build of torch cannot create fake tensors on "cuda".
_setup_privateuseone_for_python_backend("fake")
DEVICE = torch.device("fake:0")


def run(attention_type: str, implementation: str) -> None:
    config = tiny(attention_type, problem_type="single_label_classification", use_shift=attention_type == "focal")
    with DEVICE, no_init_weights():
        model = FocalForImageClassification(config)
    model.set_attn_implementation(implementation)
    labels = torch.empty(2, dtype=torch.long, device=DEVICE)
    for height, width in ((40, 52), (32, 32)):  # (32, 32) is the size of the config
        images = torch.empty(2, 3, height, width, device=DEVICE)
        with torch.no_grad():
            assert model.eval()(images).logits.device == DEVICE
        model.train()(images, labels=labels).loss.backward()
    assert all(parameter.grad.device == DEVICE for parameter in model.parameters())


if __name__ == "__main__":
    for attention_type in ("focal", "topk"):
        for implementation in ("sdpa", "eager"):
            with FakeTensorMode():
                run(attention_type, implementation)
            print(attention_type, implementation, flush=True)
