from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority
PRIORITY_LOW: Priority

class RankRequest(_message.Message):
    __slots__ = ("request_id", "model_name", "model_version", "user", "num_candidates", "candidate_ids", "item_features", "top_k", "timeout_ms", "tasks", "explain_top", "priority", "session", "propensities")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    ITEM_FEATURES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_TOP_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROPENSITIES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_name: str
    model_version: str
    user: _containers.RepeatedCompositeFieldContainer[Column]
    num_candidates: int
    candidate_ids: Column
    item_features: _containers.RepeatedCompositeFieldContainer[Column]
    top_k: int
    timeout_ms: int
    tasks: _containers.RepeatedScalarFieldContainer[str]
    explain_top: int
    priority: Priority
    session: str
    propensities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., user: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., num_candidates: _Optional[int] = ..., candidate_ids: _Optional[_Union[Column, _Mapping]] = ..., item_features: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., top_k: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., tasks: _Optional[_Iterable[str]] = ..., explain_top: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ..., session: _Optional[str] = ..., propensities: _Optional[_Iterable[float]] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("name", "int64_values", "float32_values", "float64_values", "string_values", "list_offsets", "validity")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INT64_VALUES_FIELD_NUMBER: _ClassVar[int]
    FLOAT32_VALUES_FIELD_NUMBER: _ClassVar[int]
    FLOAT64_VALUES_FIELD_NUMBER: _ClassVar[int]
    STRING_VALUES_FIELD_NUMBER: _ClassVar[int]
    LIST_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    VALIDITY_FIELD_NUMBER: _ClassVar[int]
    name: str
    int64_values: bytes
    float32_values: bytes
    float64_values: bytes
    string_values: Strings
    list_offsets: bytes
    validity: bytes
    def __init__(self, name: _Optional[str] = ..., int64_values: _Optional[bytes] = ..., float32_values: _Optional[bytes] = ..., float64_values: _Optional[bytes] = ..., string_values: _Optional[_Union[Strings, _Mapping]] = ..., list_offsets: _Optional[bytes] = ..., validity: _Optional[bytes] = ...) -> None: ...

class Strings(_message.Message):
    __slots__ = ("data", "offsets")
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    offsets: bytes
    def __init__(self, data: _Optional[bytes] = ..., offsets: _Optional[bytes] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("request_id", "model_name", "model_version", "scores", "order", "tasks", "timings", "defaults", "explanations", "staleness")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATIONS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_name: str
    model_version: str
    scores: _containers.RepeatedScalarFieldContainer[float]
    order: _containers.RepeatedScalarFieldContainer[int]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskScores]
    timings: Timings
    defaults: Defaults
    explanations: Explanations
    staleness: Staleness
    def __init__(self, request_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., scores: _Optional[_Iterable[float]] = ..., order: _Optional[_Iterable[int]] = ..., tasks: _Optional[_Iterable[_Union[TaskScores, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., defaults: _Optional[_Union[Defaults, _Mapping]] = ..., explanations: _Optional[_Union[Explanations, _Mapping]] = ..., staleness: _Optional[_Union[Staleness, _Mapping]] = ...) -> None: ...

class Explanations(_message.Message):
    __slots__ = ("features", "candidates", "contributions", "baselines")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    BASELINES_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedScalarFieldContainer[str]
    candidates: _containers.RepeatedScalarFieldContainer[int]
    contributions: _containers.RepeatedScalarFieldContainer[float]
    baselines: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, features: _Optional[_Iterable[str]] = ..., candidates: _Optional[_Iterable[int]] = ..., contributions: _Optional[_Iterable[float]] = ..., baselines: _Optional[_Iterable[float]] = ...) -> None: ...

class RankStreamResponse(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: RankResponse
    error: Error
    def __init__(self, response: _Optional[_Union[RankResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("request_id", "code", "message", "retry_after_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    code: int
    message: str
    retry_after_ms: int
    def __init__(self, request_id: _Optional[str] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "model_name", "model_version", "num_rows", "features", "timeout_ms", "tasks", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_name: str
    model_version: str
    num_rows: int
    features: _containers.RepeatedCompositeFieldContainer[Column]
    timeout_ms: int
    tasks: _containers.RepeatedScalarFieldContainer[str]
    priority: Priority
    def __init__(self, request_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., num_rows: _Optional[int] = ..., features: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., timeout_ms: _Optional[int] = ..., tasks: _Optional[_Iterable[str]] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "model_name", "model_version", "tasks", "timings", "defaults")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_name: str
    model_version: str
    tasks: _containers.RepeatedCompositeFieldContainer[TaskScores]
    timings: Timings
    defaults: Defaults
    def __init__(self, request_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[TaskScores, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., defaults: _Optional[_Union[Defaults, _Mapping]] = ...) -> None: ...

class ModelStatusRequest(_message.Message):
    __slots__ = ("model_name", "model_version")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ...) -> None: ...

class ModelStatusResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("name", "version", "state", "spec_digest", "tasks", "loaded_at_s", "leases", "reason")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[ModelVersion.State]
        LOADING: _ClassVar[ModelVersion.State]
        READY: _ClassVar[ModelVersion.State]
        DRAINING: _ClassVar[ModelVersion.State]
        FAILED: _ClassVar[ModelVersion.State]
    STATE_UNSPECIFIED: ModelVersion.State
    LOADING: ModelVersion.State
    READY: ModelVersion.State
    DRAINING: ModelVersion.State
    FAILED: ModelVersion.State
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SPEC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    LOADED_AT_S_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    state: ModelVersion.State
    spec_digest: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    loaded_at_s: float
    leases: int
    reason: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., state: _Optional[_Union[ModelVersion.State, str]] = ..., spec_digest: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., loaded_at_s: _Optional[float] = ..., leases: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model_name", "model_version")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model_name", "model_version")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ...) -> None: ...

class TaskScores(_message.Message):
    __slots__ = ("name", "scores")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    name: str
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_us", "decode_us", "cache_us", "transform_us", "lookup_us", "compute_us", "total_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    CACHE_US_FIELD_NUMBER: _ClassVar[int]
    TRANSFORM_US_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    decode_us: int
    cache_us: int
    transform_us: int
    lookup_us: int
    compute_us: int
    total_us: int
    def __init__(self, queue_us: _Optional[int] = ..., decode_us: _Optional[int] = ..., cache_us: _Optional[int] = ..., transform_us: _Optional[int] = ..., lookup_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class Staleness(_message.Message):
    __slots__ = ("candidates", "user", "oldest_ms")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    OLDEST_MS_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedScalarFieldContainer[int]
    user: bool
    oldest_ms: int
    def __init__(self, candidates: _Optional[_Iterable[int]] = ..., user: bool = ..., oldest_ms: _Optional[int] = ...) -> None: ...

class Defaults(_message.Message):
    __slots__ = ("user_columns", "item_columns", "unknown_candidates", "unknown_user", "failed_candidates", "failed_user")
    USER_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ITEM_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_USER_FIELD_NUMBER: _ClassVar[int]
    FAILED_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    FAILED_USER_FIELD_NUMBER: _ClassVar[int]
    user_columns: _containers.RepeatedScalarFieldContainer[str]
    item_columns: _containers.RepeatedScalarFieldContainer[str]
    unknown_candidates: _containers.RepeatedScalarFieldContainer[int]
    unknown_user: bool
    failed_candidates: _containers.RepeatedScalarFieldContainer[int]
    failed_user: bool
    def __init__(self, user_columns: _Optional[_Iterable[str]] = ..., item_columns: _Optional[_Iterable[str]] = ..., unknown_candidates: _Optional[_Iterable[int]] = ..., unknown_user: bool = ..., failed_candidates: _Optional[_Iterable[int]] = ..., failed_user: bool = ...) -> None: ...
