"""The decoder and what belongs to it: attention, rotary embedding, initialisation, costs."""

from smol.model.config import DecoderConfig, RopeConfig
from smol.model.decoder import Decoder
from smol.model.flops import flops_per_token, num_parameters
from smol.model.initialization import check_initialization, init_weights
from smol.model.io import load_decoder, save_decoder

__all__ = [
    "Decoder",
    "DecoderConfig",
    "RopeConfig",
    "check_initialization",
    "flops_per_token",
    "init_weights",
    "load_decoder",
    "num_parameters",
    "save_decoder",
]
