"""The project's exceptions. Each message is a sentence: the value, the limit, the remedy."""


class StepEngineError(Exception):
    """Base of everything that stepengine raises on purpose."""


class InvalidRequest(StepEngineError, ValueError):
    """A prompt or a sampling parameter that cannot be served. Raised before anything is scheduled."""


class InvalidSetting(StepEngineError, ValueError):
    """An engine setting that does not exist, does not fit, or that the chosen stage does not have."""


class ModelError(StepEngineError):
    """A model folder that is incomplete, broken or of an unsupported architecture."""


class DownloadError(ModelError):
    """A model that could not be fetched: no network, a broken download, a wrong checksum."""


class NoProgress(StepEngineError, RuntimeError):
    """A step that could run nothing although requests are waiting."""


class TraceError(StepEngineError, ValueError):
    """A trace file that cannot be read, or a figure asked of a trace that does not hold its data."""
