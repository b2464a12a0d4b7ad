"""Follow a program through the sampling loop: before each call of a denoiser set the handlers,
afterwards keep what they have computed.

All of this is outside of the denoiser's forward, so that compiled code contains none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cacheplan.adapters.calls import latent, sample
from cacheplan.adapters.loop import Loop
from cacheplan.errors import UnsupportedError
from cacheplan.plans.words import site_words
from cacheplan.runtime.features.checks import check_run, check_step
from cacheplan.runtime.features.decision import Decision
from cacheplan.runtime.features.gate import Guard
from cacheplan.runtime.features.guidance import Guidance
from cacheplan.runtime.features.program import Program
from cacheplan.runtime.features.report import FeatureReport
from cacheplan.runtime.features.step_size import StepSizes, arguments
from cacheplan.runtime.features.store import Store
from cacheplan.runtime.features.values import Constants, Forecast
from cacheplan.runtime.features.whole import Form, join, split
from cacheplan.runtime.features.wiring import Wiring
from cacheplan.types import FeatureSite


class Executor:
    """The state of one applied plan; each run of the pipeline begins anew."""

    def __init__(
        self,
        program: Program,
        wirings: Mapping[str, Wiring],
        guard: Guard | None,
        sizes: StepSizes,
        guidance: Guidance,
        report: FeatureReport,
    ) -> None:
        self.program, self.wirings, self.sizes, self.report = program, wirings, sizes, report
        self.guidance = guidance
        self.decision = Decision(program, guard)
        self.store = Store()
        self._names = list(wirings)
        self._constants: Constants = {}
        self._forms: dict[int, Form] = {}  # of the denoiser's output, per branch
        self._shapes: dict[int, torch.Size] = {}  # of the latent, per branch
        self._whole = next((site for site in program.sites if site.part == "model"), None)

    def on_start(self, loop: Loop) -> None:
        check_run(self.program.spec, loop.steps, loop.sigmas)
        self._reset()
        self.guidance.start()

    def on_call(self, loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "The denoiser is called with gradients enabled, for which kept features would be "
                "wrong: call the pipeline under torch.no_grad()."
            )
        step, branch = loop.step, loop.index(self.program.spec.branches)
        wiring = self._wiring(loop)
        given = latent(loop.module, args, kwargs)
        self._check_shape(branch, step, given)
        if loop.call == 0:
            if step == 0:
                self.report.begin(given.shape[0])
            if step in self.program.first_steps:
                self.store.clear()
                self.decision.reset()
                for other in self.wirings.values():
                    other.texts.forget()
            self.decision.begin(step, given)
        whole = self._whole
        try:
            if whole in self.program.actions[step] and not self.decision.promoted:
                assert whole is not None
                return join(self._value(whole, branch, step), given, self._forms[branch])
            if wiring.whole and not wiring.observed:  # once more, uncompiled
                wiring.observe()
                with torch.compiler.set_stance("force_eager"):
                    inner(*args, **kwargs)
                wiring.observed = True
            self._set(wiring, branch, step)
            if not wiring.observed:  # at its first call, which every plan computes
                wiring.observe()
            if loop.call == 0:
                self.decision.arm(wiring, partial(self._set, wiring, branch, step))
            output = inner(*args, **kwargs)
            wiring.observed = True
            for site, feature in wiring.collect():
                self.store.put(site, branch, step, feature)
            wiring.texts.collect(branch, first=step in self.program.first_steps)
            if whole in self.program.stores(step, promoted=self.decision.promoted):
                assert whole is not None
                feature, self._forms[branch] = split(output, given)
                self.store.put(whole, branch, step, feature)
            if loop.call == 0:
                self.decision.learn(given, sample(output))
            if self.guidance.wanted:
                self.guidance.see(sample(output))
        except BaseException:
            self._reset()
            raise
        finally:
            wiring.idle()
        return output

    def on_step(self, loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = loop.step
        check_step(self.program.spec, loop, inner, args, kwargs)
        if self.guidance.wanted:
            self.guidance.check(arguments(inner, args, kwargs).get("model_output"))
        output = self.sizes(step, inner, args, kwargs)
        self.decision.finish()
        self.report.count(self.program, step, promoted=self.decision.promoted)
        texts = sum(wiring.texts.bytes for wiring in self.wirings.values())
        self.report.see(self.store.peak + texts, self.decision.bytes)
        self.store.keep(lambda site, key: self.program.last_use[site][key] > step)
        return output

    def _set(self, wiring: Wiring, branch: int, step: int) -> None:
        """Set the handlers for the call, and make room for what it is going to keep."""
        promoted = self.decision.promoted
        for site in self.program.stores(step, promoted=promoted):
            self.store.trim(site, branch, self.program.most[site] - 1)
        wiring.set(step, lambda site: self._value(site, branch, step), promoted=promoted)
        wiring.texts.set(branch, first=step in self.program.first_steps)

    def _value(self, site: FeatureSite, branch: int, step: int) -> Forecast:
        action = self.program.actions[step][site]
        kept = self.store.newest(site, branch)
        if not kept:
            raise RuntimeError(f"bug: no {site_words(site)} is kept for step {step}")
        weights = self.program.weights(action, step, [key for key, _ in kept])
        features = [feature for _, feature in kept[: len(weights)]]
        return Forecast(features, weights, action, self._constants)

    def _check_shape(self, branch: int, step: int, given: Tensor) -> None:
        before = self._shapes.setdefault(branch, given.shape)
        if given.shape != before:
            raise UnsupportedError(
                f"The denoiser is given {' x '.join(map(str, given.shape))} numbers at step {step} "
                f"after {' x '.join(map(str, before))}, so kept features no longer fit: use the "
                "same batch and guidance for the whole run."
            )

    def _wiring(self, loop: Loop) -> Wiring:
        index = min(self.program.experts[loop.step], len(self._names) - 1)
        if loop.denoiser != self._names[index]:
            raise UnsupportedError(
                f"At step {loop.step} the pipeline calls {loop.denoiser}, but when it was profiled "
                f"it called {self._names[index]}: use the boundary and steps of the profile."
            )
        return self.wirings[loop.denoiser]

    def _reset(self) -> None:
        self.store = Store()
        self.decision.reset()
        self._forms.clear()
        self._shapes.clear()
        for wiring in self.wirings.values():
            wiring.idle()
            wiring.forget()
