"""Modules of torch whose parameters come from a seed: the same bytes from the same versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.process.gate import GATE
from engine.starters.tensors import RandomTensors, Tensor


class ModuleWeights(RandomTensors):
    """A seeded stream that also fills modules."""

    def build(self, make: Callable[[], Any]) -> Any:
        """The module that `make` constructs, with every parameter from this stream.

        Projections and convolutions keep the scale of their input, biases are small, norms pass
        everything. No parameter stays at zero, as the outputs of adapters are before training:
        each part has an effect.
        """
        module = construct(make)
        with torch.no_grad():
            for owner in module.modules():
                for name, parameter in owner.named_parameters(recurse=False):
                    parameter.copy_(torch.from_numpy(self._values(owner, name, parameter)))
        return module

    def build_vae(self, make: Callable[[], Any], gain: float) -> Any:
        """An autoencoder whose pictures have a middling contrast.

        `gain` scales the decoder's output, whose range is -1 to 1. The encoder's means are as
        large as the denoiser expects latents to be. Its variances are negligible (a standard
        deviation of 0.05): otherwise an input image would drown in noise.
        """
        vae = self.build(make)
        decoder_out = _convolution(vae.decoder.conv_out)
        encoder_out = _convolution(getattr(vae, "quant_conv", None) or vae.encoder.conv_out)
        channels = vae.config.get("latent_channels") or vae.config.z_dim
        with torch.no_grad():
            decoder_out.weight.mul_(gain)
            encoder_out.weight[:channels].div_(vae.config.get("scaling_factor", 1.0))
            encoder_out.weight[channels:].zero_()
            encoder_out.bias[channels:].fill_(-6.0)
        return vae

    def _values(self, owner: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
        shape = tuple(parameter.shape)
        if name == "bias":
            return self.normal(*shape, std=0.05)
        if isinstance(owner, nn.Embedding):
            return self.normal(*shape, std=1.0)
        if isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return self.normal(*shape, std=parameter[0].numel() ** -0.5)
        if name in {"weight", "gamma"}:  # of a norm
            return np.ones(shape, np.float32)
        return self.normal(*shape, std=shape[-1] ** -0.5)


def construct(make: Callable[[], Any]) -> Any:
    """The module in float32 on the CPU, made behind the gate; torch's state is put back.

    Constructors draw their first weights from torch's global generator. The gate puts that back
    only once an engine has registered it, so this function does.
    """
    with GATE.exclusive(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return make().eval()
        finally:
            torch.set_default_dtype(default_dtype)


def _convolution(module: Any) -> Any:
    """The convolution itself, which video models wrap to pad it in time."""
    return getattr(module, "conv", module)
