"""Model FLOPs of training and the peaks they are compared with: the two halves of MFU.

MFU = train_flops_per_token * tokens per second / (devices * peak_flops)
"""

from moe.config import ConfigError
from moe.models import DecoderConfig

# (part of jax.Device.device_kind, dense bfloat16 FLOP/s of that device). The first match counts, so a name stands
# before the shorter ones it contains.
# Sources: NVIDIA's data sheets, whose headline numbers are with sparsity and twice these; cloud.google.com/tpu/docs for
# the peaks of TPUs, jax/_src/pallas/mosaic/tpu_info.py (JAX 0.10.2) for their names.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),  # "NVIDIA GB200"
    ("B200", 2250e12),  # "NVIDIA B200"
    ("H200 NVL", 835.5e12),
    ("H200", 989e12),  # "NVIDIA H200", "NVIDIA GH200 480GB"
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989e12),  # "NVIDIA H100 80GB HBM3"
    ("A100", 312e12),  # "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"
    ("TPU v4 lite", 137e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),  # v5e
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p is "TPU v5" or "TPU v5p"
    ("TPU v6 lite", 918e12),  # v6e
    ("TPU v6e", 918e12),
    ("TPU7", 2307e12 / 2),  # "TPU7x": a chip has 2307 and is two devices of JAX, one for each TensorCore
)


def train_flops_per_token(config: DecoderConfig, seq_len: int) -> int:
    """Model FLOPs of one trained token at sequence length S = `seq_len`: 3 times the forward pass, 2 per multiply-add.

        6 * ( sum of `SublayerConfig.multiply_adds` over all sublayers + D V for the logits )

    where the multiply-adds are

        D N H + 2 D M H + N H D      attention: projections
        + N H S                      scores and mixing, of which a causal mask leaves half
        D Q + Q N (H + R) + D (C + R) + C N (H + U) + N U D + N (H + R + U) S / 2
                                     the same of latent attention (letters of `moe.layers.latent_attention`)
        3 D hidden                   dense MLP
        3 D (K F + shared_hidden)    the experts a token selects, and the shared one

    Not counted: the router, softmax, norms, rotary positions, the embedding's gather, sorting and exchanging tokens,
    balance losses and their pre-pass, recomputation, padding; nor are dropped assignments subtracted. Documents shorter
    than S are counted as if they were packed into one, so the second term is an upper bound for packed sequences.

    Source: `num_floating_point_operations` of Megatron-LM (megatron/training/training.py). Differs from it: V is the
    config's vocabulary. torchtitan counts scores and mixing in full, twice as much. Raises ConfigError if S < 1.
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len = {seq_len}: must be at least 1")
    layers = sum(
        stack.repeats * sublayer.multiply_adds(config.width, seq_len)
        for stack in config.layout
        for sublayer in stack.layers
    )
    logits = config.width * config.vocab_size
    ahead = config.ahead.multiply_adds(config.width, config.vocab_size) if config.ahead is not None else 0
    return 6 * round(layers + logits + ahead)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one `jax.Device` with this `device_kind`; None for a CPU or a kind that is not known.

    A device is not always a chip: TPU7x has two for each. A slice of a GPU (MIG) has no peak of its own: None.
    """
    if "MIG" in device_kind:
        return None
    return next((peak for name, peak in _PEAKS if name in device_kind), None)
