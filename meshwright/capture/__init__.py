"""From an ``nn.Module`` to an OpGraph; the only place in the planning core that knows torch."""

from __future__ import annotations

from meshwright.capture.captured import CapturedModel, capture
from meshwright.capture.execute import StepResult, execute

__all__ = ["CapturedModel", "StepResult", "capture", "execute"]
