"""A decoder's forward with the capture of the shallow states.

Suffixes: B batch, L (local) length, D model dim, K chunks of consecutive tokens that a rank holds.
"""

import spmd_types as spmd
import torch
from torch import Tensor

from nitp_titan.objectives.alignment import next_implicit_tokens
from nitp_titan.objectives.nitp import NITPModule
from nitp_titan.objectives.objective import Observer
from nitp_titan.objectives.sites import layer_site, TARGET


class NITPDecoder:
    """Mixin for `torchtitan.models.common.decoder.Decoder`: forward with capture of the implicit token.

    Training returns ``(h, z, halo, valid)`` to the loss (`ImplicitTarget.forward`). With gradients off it returns ``h``
    alone, so that validation reports plain cross-entropy. A pipeline stage hands the captured state on as its second
    output.
    """

    nitp: NITPModule | None
    """Of the last stage; None with weight 0."""

    observer: Observer | None = None
    """Shown the output of every layer; set by the trainer, whose base class builds the model."""

    def forward(self, tokens, z_BLD=None, positions=None, attention_masks=None):
        # Decoder.forward with the capture; a test fails when upstream's changes.
        settings = self.config.nitp
        target_layer = None if settings is None else settings.target_layer
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        if target_layer == 0 and self.tok_embeddings is not None:
            z_BLD = h.detach() if settings.stop_gradient else h
        if self.tok_embeddings is not None:
            self.observe_layer(0, h, positions)

        for name, layer in self.layers.items():
            h = layer(h, attention_masks, positions)
            self.observe_layer(int(name) + 1, h, positions)
            if int(name) + 1 == target_layer:
                z_BLD = h.detach() if settings.stop_gradient else h

        h = self.norm(h) if self.norm is not None else h

        if self.lm_head is None:
            return h if z_BLD is None else (h, z_BLD)
        if not self._skip_lm_head:
            return self.lm_head(h)
        return self.with_target(h, z_BLD, positions)

    def observe_layer(self, number: int, h: Tensor, positions: Tensor) -> None:
        """Show the observer a layer's output, 1 to the number of layers; 0 is the token embedding."""
        if self.observer is not None:
            self.observer.observe(layer_site(number), h, positions)

    def with_target(self, h: Tensor, z_BLD: Tensor | None, positions: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Output of the last stage: hidden states alone, or in training with the parts of their targets."""
        training = torch.is_grad_enabled()
        observer = self.observer if self.observer is not None and self.observer.active else None
        target = None if self.nitp is None else self.nitp.target
        if z_BLD is None or target is None or not (training or observer):
            return h
        z_BLD, halo_BKD, valid_BL = target(z_BLD, positions)
        if observer is not None:
            with spmd.no_typecheck():
                target_BLD = next_implicit_tokens(z_BLD, halo_BKD)
            observer.observe(TARGET, target_BLD, positions)
        return (h, z_BLD, halo_BKD, valid_BL) if training else h
