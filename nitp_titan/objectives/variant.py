"""Any decoder of TorchTitan with an auxiliary objective."""

import dataclasses
from dataclasses import dataclass
from functools import cache

from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.mtp import MTPDecoder
from torchtitan.protocols.model_spec import ModelSpec

from nitp_titan.errors import UserError
from nitp_titan.objectives.decoder import NITPDecoder
from nitp_titan.objectives.export import without_training_weights
from nitp_titan.objectives.nitp import NITPModule, set_nitp_sharding
from nitp_titan.objectives.parallelize import with_nitp_parallelize, with_nitp_pipelining
from nitp_titan.objectives.registry import build_objective
from nitp_titan.objectives.settings import NITPConfig


def with_nitp(spec: ModelSpec, settings: NITPConfig) -> ModelSpec:
    """The NITP variant of a model: same backbone, plus projector, target and their parallelism.

    Args:
        spec: any decoder of TorchTitan or built from its `Decoder`; the variant shares its configs.
        settings: the `[nitp]` table; with weight 0 the variant only shows its layers to an observer.

    Returns:
        A new spec. Quantization converters applied to it reach the projector, whose
        names start with ``nitp.projector``.

    Raises:
        UserError: if the target layer is missing or outside the model, or the family has a
            forward of its own and no ``nitp_decoder`` that captures implicit tokens in it.
    """
    settings.check_model(len(spec.model.layers), spec.model.dim)
    base = type(spec.model)._owner
    try:
        decoder = _nitp_decoder(base, spec)
    except UserError as error:
        if settings.enabled:
            raise
        raise UserError(
            f"[geometry] layers = true shows every layer as NITP does: {error} With layers = false "
            "(--geometry.no-layers) the last hidden state alone is measured, in any family.",
            table="geometry",
            key="layers",
        ) from None
    fields = {field.name: getattr(spec.model, field.name) for field in dataclasses.fields(spec.model)}
    model_config = nitp_model_class(base, decoder).Config
    if not settings.enabled:
        return dataclasses.replace(spec, model=model_config(**fields))
    module = build_objective(settings).module_config(spec.model.dim)
    return dataclasses.replace(
        spec,
        model=model_config(**fields, nitp=module),
        parallelize_fn=with_nitp_parallelize(spec.parallelize_fn),
        pipelining_fn=spec.pipelining_fn and with_nitp_pipelining(spec.pipelining_fn),
        state_dict_adapter=spec.state_dict_adapter and without_training_weights(spec.state_dict_adapter),
    )


def _nitp_decoder(base: type, spec: ModelSpec) -> type:
    """The mixin whose forward captures the implicit tokens of a model class.

    A class with a forward of its own names it as ``nitp_decoder``, beside that forward.
    """
    if getattr(spec.model, "mtp_layers", None):
        raise UserError(
            f"[nitp] {spec.name} {spec.flavor} has multi-token prediction layers, whose loss (MTPLoss) TorchTitan "
            "0.3.0 neither chunks nor combines with another; train it with num_mtp_layers = 0."
        )
    owner = next(cls for cls in base.__mro__ if "forward" in vars(cls))
    if owner in (Decoder, MTPDecoder):
        return NITPDecoder
    if "nitp_decoder" not in vars(owner):
        raise UserError(
            f"[nitp] {owner.__module__}.{owner.__name__} overrides Decoder.forward, in which NITP captures the "
            "implicit token. Implement a subclass of nitp_titan.objectives.decoder.NITPDecoder with that forward and "
            f"the capture, and name it as {owner.__name__}.nitp_decoder."
        )
    return vars(owner)["nitp_decoder"]


@cache
def nitp_model_class(base: type[Decoder], decoder: type[NITPDecoder] = NITPDecoder) -> type[Decoder]:
    """Model class ``NITP<base>`` with the objective's module registered after the backbone.

    Being last, it is initialised last: for one seed the backbone's initial weights are
    those of the model without NITP.
    """

    class NITPModel(decoder, base):  # type: ignore[valid-type, misc]  # of any family
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):  # type: ignore[name-defined]  # as above
            nitp: NITPModule.Config | None = None

            def update_from_config(self, *, config, **kwargs) -> None:
                base.Config.update_from_config(self, config=config, **kwargs)
                if self.nitp is not None:
                    set_nitp_sharding(self.nitp, config.parallelism)

        def __init__(self, config: Config):
            super().__init__(config)
            self.nitp = config.nitp.build() if config.nitp is not None else None

    NITPModel.__name__ = NITPModel.__qualname__ = f"NITP{base.__name__}"
    return NITPModel
