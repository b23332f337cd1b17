"""The vLLM plugin: a W4A16 server prefills on dense twins and decodes on vLLM's own int4 kernels. Nothing runs in mode `off`.

`config` reads the settings, `compat` is all that reaches into vLLM, `kernel` wraps the kernel vLLM would choose, `op` picks a
path at run time, `build` makes twins and `own` copies, `spare` frees what they replace, `measure` times each kind of layers
(`kinds`), for which `early` compiles before any is made and `ahead` from then on, `offers` is what the planner gets of that,
`weight_only` says what may have a twin, `life` follows one worker from load to reload, `metrics` shows what it does. `bench`
compares off and on.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every process of a server, more than once; touches no device.

    Raises ConfigError for a TWINWEIGHT_* variable that cannot be used: it stops start-up, as an error at import would not.
    """
    import os

    from twinweight.engines.vllm import compat
    from twinweight.engines.vllm.config import from_environment

    given = from_environment(os.environ)
    if compat.known():
        compat.on_arguments(_begin)
        compat.on_init_device(_start)
        compat.on_metrics(_show)
        return
    try:
        compat.on_init_device(_start)  # which only warns, where the server asks for twins
    except (ImportError, AttributeError):
        if given.get("mode", "off") != "off":
            compat.warn_unknown()


def _begin(arguments: Any) -> None:
    """In a front end, before it inspects the model. A wrong setting stops the start later, in every process alike."""
    import os
    from contextlib import suppress

    from twinweight.engines.vllm.config import resolve
    from twinweight.errors import ConfigError

    with suppress(ConfigError):
        config = resolve(arguments.additional_config, os.environ)
        if config.mode != "off":
            from twinweight.engines.vllm import early

            early.begin(arguments, config)


def _start(worker: object, vllm_config: object) -> None:
    """Before a worker opens its device: settings are checked in every mode; anything else happens only where twins are on."""
    import os
    import sys

    from twinweight.engines.vllm import compat
    from twinweight.engines.vllm.config import resolve

    config = resolve(compat.additional_config(vllm_config), os.environ)
    if config.mode != "off" and not compat.known():
        compat.warn_unknown()
    elif config.mode != "off" and compat.allows_twins(vllm_config):
        compat.remember_active(vllm_config, config.as_dict())
        from twinweight.engines.vllm.life import Life

        Life(worker, config).follow()
    elif kernel := sys.modules.get("twinweight.engines.vllm.kernel"):  # an earlier server of this process had twins
        compat.unprefer(kernel.TwinLinearKernel)


def _show(vllm_config: object) -> None:
    """In a front end that serves `/metrics`; ours join where twins are on."""
    import os

    from twinweight.engines.vllm import compat, metrics
    from twinweight.engines.vllm.config import resolve

    metrics.show(vllm_config, on=resolve(compat.additional_config(vllm_config), os.environ).mode != "off")
