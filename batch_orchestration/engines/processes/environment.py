"""Selects the environment of an engine's server: the variables it needs, none of our secrets.

Models bring their own code, and a compromised server reveals its environment.
"""

import os
import re
from collections.abc import Mapping

#: Common to all programs: paths, locale and terminal, proxies and certificates.
_NAMES = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TMPDIR", "TZ", "LANG", "LANGUAGE",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX", "GLIBC_TUNABLES",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
})  # fmt: skip
#: Of Python, vLLM and the libraries below it.
_PREFIXES = (
    "PYTHON", "LC_", "XDG_", "MALLOC_", "VLLM_", "HF_", "TRANSFORMERS_", "TOKENIZERS_",
    "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_",
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "NUMBA_",
    "HIP_", "HSA_", "ROCR_",
)  # fmt: skip
#: Under any library's prefix; a hub's token is passed on only if the model comes from a hub.
_SECRET = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_|$)")


def child_environment(
    given: Mapping[str, str | None], *, ours: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the complete environment of a server.

    Args:
        given: Added to the environment of every server; None passes on our own value, if any.
        ours: Our environment; by default that of this process.
    """
    ours = os.environ if ours is None else ours
    environment = {name: value for name, value in ours.items() if _is_for_servers(name)}
    for name, value in given.items():
        if (present := ours.get(name) if value is None else value) is not None:
            environment[name] = present
    return environment


def _is_for_servers(name: str) -> bool:
    # Proxy variables also exist in lower case.
    return name.upper() in _NAMES or (name.startswith(_PREFIXES) and not _SECRET.search(name))
