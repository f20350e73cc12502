from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class CommandsResponse(_message.Message):
    __slots__ = ("command",)
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    command: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, command: _Optional[_Iterable[str]] = ...) -> None: ...

class LogMessage(_message.Message):
    __slots__ = ("line",)
    LINE_FIELD_NUMBER: _ClassVar[int]
    line: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, line: _Optional[_Iterable[str]] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ResourceRequest(_message.Message):
    __slots__ = ("path", "stage")
    PATH_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    path: str
    stage: str
    def __init__(self, path: _Optional[str] = ..., stage: _Optional[str] = ...) -> None: ...

class ResourceChunk(_message.Message):
    __slots__ = ("header", "chunk", "eof")
    class ResourceHeader(_message.Message):
        __slots__ = ("sourcePath", "targetPath", "fileMode", "isDir", "targetUser", "targetWorkdir", "id")
        SOURCEPATH_FIELD_NUMBER: _ClassVar[int]
        TARGETPATH_FIELD_NUMBER: _ClassVar[int]
        FILEMODE_FIELD_NUMBER: _ClassVar[int]
        ISDIR_FIELD_NUMBER: _ClassVar[int]
        TARGETUSER_FIELD_NUMBER: _ClassVar[int]
        TARGETWORKDIR_FIELD_NUMBER: _ClassVar[int]
        ID_FIELD_NUMBER: _ClassVar[int]
        sourcePath: str
        targetPath: str
        fileMode: int
        isDir: bool
        targetUser: str
        targetWorkdir: str
        id: str
        def __init__(self, sourcePath: _Optional[str] = ..., targetPath: _Optional[str] = ..., fileMode: _Optional[int] = ..., isDir: _Optional[bool] = ..., targetUser: _Optional[str] = ..., targetWorkdir: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...
    class ResourceContents(_message.Message):
        __slots__ = ("chunk", "checksum", "id")
        CHUNK_FIELD_NUMBER: _ClassVar[int]
        CHECKSUM_FIELD_NUMBER: _ClassVar[int]
        ID_FIELD_NUMBER: _ClassVar[int]
        chunk: bytes
        checksum: bytes
        id: str
        def __init__(self, chunk: _Optional[bytes] = ..., checksum: _Optional[bytes] = ..., id: _Optional[str] = ...) -> None: ...
    class ResourceEof(_message.Message):
        __slots__ = ("id",)
        ID_FIELD_NUMBER: _ClassVar[int]
        id: str
        def __init__(self, id: _Optional[str] = ...) -> None: ...
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    EOF_FIELD_NUMBER: _ClassVar[int]
    header: ResourceChunk.ResourceHeader
    chunk: ResourceChunk.ResourceContents
    eof: ResourceChunk.ResourceEof
    def __init__(self, header: _Optional[_Union[ResourceChunk.ResourceHeader, _Mapping]] = ..., chunk: _Optional[_Union[ResourceChunk.ResourceContents, _Mapping]] = ..., eof: _Optional[_Union[ResourceChunk.ResourceEof, _Mapping]] = ...) -> None: ...

class ToGuest(_message.Message):
    __slots__ = ("run", "apply", "workdir", "checkpoint", "finish", "group", "piece", "files_end", "agent_reply", "input", "signal", "window", "identity", "probe")
    RUN_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    WORKDIR_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    FILES_END_FIELD_NUMBER: _ClassVar[int]
    AGENT_REPLY_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    run: Run
    apply: Apply
    workdir: Workdir
    checkpoint: Checkpoint
    finish: Finish
    group: Group
    piece: Piece
    files_end: FilesEnd
    agent_reply: AgentReply
    input: Input
    signal: Signal
    window: Window
    identity: Identity
    probe: Probe
    def __init__(self, run: _Optional[_Union[Run, _Mapping]] = ..., apply: _Optional[_Union[Apply, _Mapping]] = ..., workdir: _Optional[_Union[Workdir, _Mapping]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., group: _Optional[_Union[Group, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ..., files_end: _Optional[_Union[FilesEnd, _Mapping]] = ..., agent_reply: _Optional[_Union[AgentReply, _Mapping]] = ..., input: _Optional[_Union[Input, _Mapping]] = ..., signal: _Optional[_Union[Signal, _Mapping]] = ..., window: _Optional[_Union[Window, _Mapping]] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ...) -> None: ...

class FromGuest(_message.Message):
    __slots__ = ("hello", "alive", "output", "want", "done", "layer", "agent_request", "input_taken", "begun", "identity", "probed", "failing")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    AGENT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    INPUT_TAKEN_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    FAILING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    alive: Alive
    output: Output
    want: Want
    done: Done
    layer: Layer
    agent_request: AgentRequest
    input_taken: InputTaken
    begun: Begun
    identity: IdentityState
    probed: Probed
    failing: Done
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., layer: _Optional[_Union[Layer, _Mapping]] = ..., agent_request: _Optional[_Union[AgentRequest, _Mapping]] = ..., input_taken: _Optional[_Union[InputTaken, _Mapping]] = ..., begun: _Optional[_Union[Begun, _Mapping]] = ..., identity: _Optional[_Union[IdentityState, _Mapping]] = ..., probed: _Optional[_Union[Probed, _Mapping]] = ..., failing: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class Alive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Begun(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Step(_message.Message):
    __slots__ = ("number", "text", "workdir", "user")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WORKDIR_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    number: int
    text: str
    workdir: str
    user: str
    def __init__(self, number: _Optional[int] = ..., text: _Optional[str] = ..., workdir: _Optional[str] = ..., user: _Optional[str] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("step", "argv", "env", "args", "script", "mounts", "network", "attach", "pauses")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ARGV_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    SCRIPT_FIELD_NUMBER: _ClassVar[int]
    MOUNTS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    PAUSES_FIELD_NUMBER: _ClassVar[int]
    step: Step
    argv: _containers.RepeatedScalarFieldContainer[str]
    env: _containers.RepeatedCompositeFieldContainer[Variable]
    args: _containers.RepeatedCompositeFieldContainer[Variable]
    script: str
    mounts: _containers.RepeatedCompositeFieldContainer[Mount]
    network: str
    attach: Attach
    pauses: bool
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., argv: _Optional[_Iterable[str]] = ..., env: _Optional[_Iterable[_Union[Variable, _Mapping]]] = ..., args: _Optional[_Iterable[_Union[Variable, _Mapping]]] = ..., script: _Optional[str] = ..., mounts: _Optional[_Iterable[_Union[Mount, _Mapping]]] = ..., network: _Optional[str] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., pauses: _Optional[bool] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("input", "terminal", "window", "read_only", "identity", "init", "probed", "volumes")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    TERMINAL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    INIT_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    VOLUMES_FIELD_NUMBER: _ClassVar[int]
    input: bool
    terminal: bool
    window: Window
    read_only: bool
    identity: IdentityFiles
    init: bool
    probed: bool
    volumes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, input: _Optional[bool] = ..., terminal: _Optional[bool] = ..., window: _Optional[_Union[Window, _Mapping]] = ..., read_only: _Optional[bool] = ..., identity: _Optional[_Union[IdentityFiles, _Mapping]] = ..., init: _Optional[bool] = ..., probed: _Optional[bool] = ..., volumes: _Optional[_Iterable[str]] = ...) -> None: ...

class IdentityFiles(_message.Message):
    __slots__ = ("names", "owner", "mode", "csr")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    owner: str
    mode: int
    csr: bool
    def __init__(self, names: _Optional[_Iterable[str]] = ..., owner: _Optional[str] = ..., mode: _Optional[int] = ..., csr: _Optional[bool] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("number", "chain", "trust")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    number: int
    chain: str
    trust: str
    def __init__(self, number: _Optional[int] = ..., chain: _Optional[str] = ..., trust: _Optional[str] = ...) -> None: ...

class IdentityState(_message.Message):
    __slots__ = ("number", "csr", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    csr: bytes
    error: str
    def __init__(self, number: _Optional[int] = ..., csr: _Optional[bytes] = ..., error: _Optional[str] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("argv",)
    ARGV_FIELD_NUMBER: _ClassVar[int]
    argv: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, argv: _Optional[_Iterable[str]] = ...) -> None: ...

class Probed(_message.Message):
    __slots__ = ("exit_code", "output")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    output: bytes
    def __init__(self, exit_code: _Optional[int] = ..., output: _Optional[bytes] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("data", "last")
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    last: bool
    def __init__(self, data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class Signal(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("rows", "columns")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    columns: int
    def __init__(self, rows: _Optional[int] = ..., columns: _Optional[int] = ...) -> None: ...

class InputTaken(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class Variable(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class Mount(_message.Message):
    __slots__ = ("target", "resource", "bind", "cache", "tmpfs", "secret", "ssh")
    class Bind(_message.Message):
        __slots__ = ("writable",)
        WRITABLE_FIELD_NUMBER: _ClassVar[int]
        writable: bool
        def __init__(self, writable: _Optional[bool] = ...) -> None: ...
    class Cache(_message.Message):
        __slots__ = ("id", "sharing", "read_only", "access")
        ID_FIELD_NUMBER: _ClassVar[int]
        SHARING_FIELD_NUMBER: _ClassVar[int]
        READ_ONLY_FIELD_NUMBER: _ClassVar[int]
        ACCESS_FIELD_NUMBER: _ClassVar[int]
        id: str
        sharing: str
        read_only: bool
        access: Mount.Access
        def __init__(self, id: _Optional[str] = ..., sharing: _Optional[str] = ..., read_only: _Optional[bool] = ..., access: _Optional[_Union[Mount.Access, _Mapping]] = ...) -> None: ...
    class Tmpfs(_message.Message):
        __slots__ = ("size",)
        SIZE_FIELD_NUMBER: _ClassVar[int]
        size: int
        def __init__(self, size: _Optional[int] = ...) -> None: ...
    class Secret(_message.Message):
        __slots__ = ("env", "access")
        ENV_FIELD_NUMBER: _ClassVar[int]
        ACCESS_FIELD_NUMBER: _ClassVar[int]
        env: str
        access: Mount.Access
        def __init__(self, env: _Optional[str] = ..., access: _Optional[_Union[Mount.Access, _Mapping]] = ...) -> None: ...
    class Ssh(_message.Message):
        __slots__ = ("id", "access")
        ID_FIELD_NUMBER: _ClassVar[int]
        ACCESS_FIELD_NUMBER: _ClassVar[int]
        id: str
        access: Mount.Access
        def __init__(self, id: _Optional[str] = ..., access: _Optional[_Union[Mount.Access, _Mapping]] = ...) -> None: ...
    class Access(_message.Message):
        __slots__ = ("mode", "uid", "gid")
        MODE_FIELD_NUMBER: _ClassVar[int]
        UID_FIELD_NUMBER: _ClassVar[int]
        GID_FIELD_NUMBER: _ClassVar[int]
        mode: int
        uid: int
        gid: int
        def __init__(self, mode: _Optional[int] = ..., uid: _Optional[int] = ..., gid: _Optional[int] = ...) -> None: ...
    TARGET_FIELD_NUMBER: _ClassVar[int]
    RESOURCE_FIELD_NUMBER: _ClassVar[int]
    BIND_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    TMPFS_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    SSH_FIELD_NUMBER: _ClassVar[int]
    target: str
    resource: str
    bind: Mount.Bind
    cache: Mount.Cache
    tmpfs: Mount.Tmpfs
    secret: Mount.Secret
    ssh: Mount.Ssh
    def __init__(self, target: _Optional[str] = ..., resource: _Optional[str] = ..., bind: _Optional[_Union[Mount.Bind, _Mapping]] = ..., cache: _Optional[_Union[Mount.Cache, _Mapping]] = ..., tmpfs: _Optional[_Union[Mount.Tmpfs, _Mapping]] = ..., secret: _Optional[_Union[Mount.Secret, _Mapping]] = ..., ssh: _Optional[_Union[Mount.Ssh, _Mapping]] = ...) -> None: ...

class Apply(_message.Message):
    __slots__ = ("step", "target", "target_is_directory", "chown", "chmod", "link")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TARGET_IS_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    CHOWN_FIELD_NUMBER: _ClassVar[int]
    CHMOD_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    step: Step
    target: str
    target_is_directory: bool
    chown: str
    chmod: str
    link: bool
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., target: _Optional[str] = ..., target_is_directory: _Optional[bool] = ..., chown: _Optional[str] = ..., chmod: _Optional[str] = ..., link: _Optional[bool] = ...) -> None: ...

class Workdir(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: Step
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Group(_message.Message):
    __slots__ = ("from_directory", "keep_owner", "of_tree", "passed")
    FROM_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    KEEP_OWNER_FIELD_NUMBER: _ClassVar[int]
    OF_TREE_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    from_directory: bool
    keep_owner: bool
    of_tree: bool
    passed: bool
    def __init__(self, from_directory: _Optional[bool] = ..., keep_owner: _Optional[bool] = ..., of_tree: _Optional[bool] = ..., passed: _Optional[bool] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class FilesEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Output(_message.Message):
    __slots__ = ("stderr", "data")
    STDERR_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    stderr: bool
    data: bytes
    def __init__(self, stderr: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("resource",)
    RESOURCE_FIELD_NUMBER: _ClassVar[int]
    resource: str
    def __init__(self, resource: _Optional[str] = ...) -> None: ...

class AgentRequest(_message.Message):
    __slots__ = ("number", "id", "message")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    id: str
    message: bytes
    def __init__(self, number: _Optional[int] = ..., id: _Optional[str] = ..., message: _Optional[bytes] = ...) -> None: ...

class AgentReply(_message.Message):
    __slots__ = ("number", "message")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    message: bytes
    def __init__(self, number: _Optional[int] = ..., message: _Optional[bytes] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("step", "duration_ms", "failure", "exit_code")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    step: int
    duration_ms: int
    failure: Failure
    exit_code: int
    def __init__(self, step: _Optional[int] = ..., duration_ms: _Optional[int] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., exit_code: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("error", "exit_code", "reason")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    error: str
    exit_code: int
    reason: str
    def __init__(self, error: _Optional[str] = ..., exit_code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("data", "last")
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    last: bool
    def __init__(self, data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...
