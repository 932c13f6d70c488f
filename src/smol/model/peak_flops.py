"""What a device could do at most: the denominator of model-FLOPs utilisation."""

PEAK_FLOPS = {
    # Blackwell, Hopper: https://resources.nvidia.com/en-us-blackwell-architecture and
    # https://resources.nvidia.com/en-us-tensor-core, the figures with sparsity halved.
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "GH200 480GB": 989.4e12,
    "H100 80GB HBM3": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    # Ampere and Ada, data centre
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "L4": 121e12,
    "L40": 181.05e12,
    "L40S": 362.05e12,
    # Workstation and desktop, products summed in float32
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada Generation": 364.2e12,
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 5090": 209.5e12,
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    "AMD Instinct MI300X": 1307.4e12,
}
"""Dense bfloat16 operations per second by the name that the driver gives, without ``NVIDIA``."""


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations per second of a device.

    Names are compared whole: a variant of a known card, or a slice of one (MIG), is another device.

    Args:
        device_name: As ``torch.cuda.get_device_name`` tells it.

    Returns:
        Operations per second, or ``None`` for a device that the table does not have.
    """
    return PEAK_FLOPS.get(device_name.strip().removeprefix("NVIDIA "))
