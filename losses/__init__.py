"""Contrastive losses whose memory is linear in the batch, and the literature's losses beside them."""

from __future__ import annotations

from losses.inf_cl import InfCLLoss, inf_cl_loss
from losses.literature import clip_loss

__all__ = ["InfCLLoss", "clip_loss", "inf_cl_loss"]
