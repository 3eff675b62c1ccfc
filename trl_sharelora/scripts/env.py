"""What a bug report needs: versions and devices. No tokens, no paths, no environment variables."""

import platform
from importlib.metadata import PackageNotFoundError, version


PACKAGES = (
    "trl-sharelora",
    "trl",
    "peft",
    "transformers",
    "torch",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
)


def environment() -> dict[str, str]:
    """Name -> version of everything a result may depend on, and the devices.

    ```python
    >>> environment()["PEFT method"]
    'SHARELORA registered'
    ```
    """
    import torch
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {"platform": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["devices"] = _devices(torch)
    found["cpu threads of torch"] = str(torch.get_num_threads())
    found["PEFT method"] = "SHARELORA " + ("registered" if "SHARELORA" in PEFT_TYPE_TO_CONFIG_MAPPING else "missing")
    return found


def _devices(torch) -> str:
    if not torch.accelerator.is_available():
        return "cpu only"
    device = torch.accelerator.current_accelerator().type
    if device == "cuda":
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return f"{torch.accelerator.device_count()} x {device}"


def print_environment() -> None:
    """Print [`environment`] as a list to paste into an issue."""
    print("Paste this into the report of an issue:\n")
    for name, value in environment().items():
        print(f"- {name}: {value}")


if __name__ == "__main__":
    print_environment()
