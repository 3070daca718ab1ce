"""Turn any TorchTitan decoder into its NITP variant."""

import dataclasses
from dataclasses import dataclass
from functools import cache

from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.mtp import MTPDecoder
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.config import NITPConfig, UserError
from nitp_titan.hf import without_projector
from nitp_titan.nitp import NITP, nitp_module_config, NITPDecoder, set_nitp_sharding
from nitp_titan.parallelize import with_nitp_parallelize, with_nitp_pipelining


def with_nitp(spec: ModelSpec, settings: NITPConfig) -> ModelSpec:
    """The NITP variant of a model: same backbone, plus projector, target and their parallelism.

    Args:
        spec: any decoder of TorchTitan or built from its `Decoder`; the variant shares its configs.
        settings: the `[nitp]` table.

    Returns:
        A new spec. Quantization converters applied to it reach the projector, whose
        names start with ``nitp.projector``.

    Raises:
        UserError: if the target layer is missing or outside the model, or the family has
            a forward of its own, which the capture of implicit tokens cannot follow.
    """
    settings.check_model(len(spec.model.layers))
    base = type(spec.model)._owner
    own_mtp = getattr(spec.model, "mtp_layers", [])
    if not issubclass(base, Decoder) or base.forward not in (Decoder.forward, MTPDecoder.forward) or own_mtp:
        raise UserError(
            f"[nitp] model family '{spec.name}' has its own forward; NITP follows TorchTitan's Decoder.forward only."
        )
    fields = {field.name: getattr(spec.model, field.name) for field in dataclasses.fields(spec.model)}
    model = nitp_model_class(base).Config(**fields, nitp=nitp_module_config(spec.model.dim, settings))
    return dataclasses.replace(
        spec,
        model=model,
        parallelize_fn=with_nitp_parallelize(spec.parallelize_fn),
        pipelining_fn=spec.pipelining_fn and with_nitp_pipelining(spec.pipelining_fn),
        state_dict_adapter=spec.state_dict_adapter and without_projector(spec.state_dict_adapter),
    )


@cache
def nitp_model_class(base: type[Decoder]) -> type[Decoder]:
    """Model class ``NITP<base>`` with the NITP module registered after the backbone.

    Being last, it is initialised last: for one seed the backbone's initial weights are
    those of the model without NITP.
    """

    class NITPModel(NITPDecoder, base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            nitp: NITP.Config

            def update_from_config(self, *, config, **kwargs) -> None:
                base.Config.update_from_config(self, config=config, **kwargs)
                set_nitp_sharding(self.nitp, config.parallelism)

        def __init__(self, config: Config):
            super().__init__(config)
            self.nitp = config.nitp.build()

    NITPModel.__name__ = NITPModel.__qualname__ = f"NITP{base.__name__}"
    return NITPModel
