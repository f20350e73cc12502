from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EntryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTRY_KIND_UNSPECIFIED: _ClassVar[EntryKind]
    ENTRY_KIND_FILE: _ClassVar[EntryKind]
    ENTRY_KIND_DIRECTORY: _ClassVar[EntryKind]
    ENTRY_KIND_SYMLINK: _ClassVar[EntryKind]
    ENTRY_KIND_HARDLINK: _ClassVar[EntryKind]
ENTRY_KIND_UNSPECIFIED: EntryKind
ENTRY_KIND_FILE: EntryKind
ENTRY_KIND_DIRECTORY: EntryKind
ENTRY_KIND_SYMLINK: EntryKind
ENTRY_KIND_HARDLINK: EntryKind

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("error", "step", "exit_code", "reason")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    error: str
    step: int
    exit_code: int
    reason: str
    def __init__(self, error: _Optional[str] = ..., step: _Optional[int] = ..., exit_code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class CommandsResponse(_message.Message):
    __slots__ = ("command",)
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    command: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, command: _Optional[_Iterable[str]] = ...) -> None: ...

class LogMessage(_message.Message):
    __slots__ = ("line", "data", "step", "event")
    LINE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    line: _containers.RepeatedScalarFieldContainer[str]
    data: bytes
    step: int
    event: StepEvent
    def __init__(self, line: _Optional[_Iterable[str]] = ..., data: _Optional[bytes] = ..., step: _Optional[int] = ..., event: _Optional[_Union[StepEvent, _Mapping]] = ...) -> None: ...

class StepEvent(_message.Message):
    __slots__ = ("kind", "exit_code", "duration_ms")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[StepEvent.Kind]
        STARTED: _ClassVar[StepEvent.Kind]
        FINISHED: _ClassVar[StepEvent.Kind]
    UNSPECIFIED: StepEvent.Kind
    STARTED: StepEvent.Kind
    FINISHED: StepEvent.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    kind: StepEvent.Kind
    exit_code: int
    duration_ms: int
    def __init__(self, kind: _Optional[_Union[StepEvent.Kind, str]] = ..., exit_code: _Optional[int] = ..., duration_ms: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("header", "chunk", "eof", "group", "piece")
    class ResourceHeader(_message.Message):
        __slots__ = ("sourcePath", "targetPath", "fileMode", "isDir", "targetUser", "targetWorkdir", "id", "kind", "entryPath", "linkTarget", "size", "mtimeNs", "fromDirectory", "keepOwner", "uid", "gid", "ofTree")
        SOURCEPATH_FIELD_NUMBER: _ClassVar[int]
        TARGETPATH_FIELD_NUMBER: _ClassVar[int]
        FILEMODE_FIELD_NUMBER: _ClassVar[int]
        ISDIR_FIELD_NUMBER: _ClassVar[int]
        TARGETUSER_FIELD_NUMBER: _ClassVar[int]
        TARGETWORKDIR_FIELD_NUMBER: _ClassVar[int]
        ID_FIELD_NUMBER: _ClassVar[int]
        KIND_FIELD_NUMBER: _ClassVar[int]
        ENTRYPATH_FIELD_NUMBER: _ClassVar[int]
        LINKTARGET_FIELD_NUMBER: _ClassVar[int]
        SIZE_FIELD_NUMBER: _ClassVar[int]
        MTIMENS_FIELD_NUMBER: _ClassVar[int]
        FROMDIRECTORY_FIELD_NUMBER: _ClassVar[int]
        KEEPOWNER_FIELD_NUMBER: _ClassVar[int]
        UID_FIELD_NUMBER: _ClassVar[int]
        GID_FIELD_NUMBER: _ClassVar[int]
        OFTREE_FIELD_NUMBER: _ClassVar[int]
        sourcePath: str
        targetPath: str
        fileMode: int
        isDir: bool
        targetUser: str
        targetWorkdir: str
        id: str
        kind: EntryKind
        entryPath: str
        linkTarget: str
        size: int
        mtimeNs: int
        fromDirectory: bool
        keepOwner: bool
        uid: int
        gid: int
        ofTree: bool
        def __init__(self, sourcePath: _Optional[str] = ..., targetPath: _Optional[str] = ..., fileMode: _Optional[int] = ..., isDir: _Optional[bool] = ..., targetUser: _Optional[str] = ..., targetWorkdir: _Optional[str] = ..., id: _Optional[str] = ..., kind: _Optional[_Union[EntryKind, str]] = ..., entryPath: _Optional[str] = ..., linkTarget: _Optional[str] = ..., size: _Optional[int] = ..., mtimeNs: _Optional[int] = ..., fromDirectory: _Optional[bool] = ..., keepOwner: _Optional[bool] = ..., uid: _Optional[int] = ..., gid: _Optional[int] = ..., ofTree: _Optional[bool] = ...) -> None: ...
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
    class Group(_message.Message):
        __slots__ = ("fromDirectory", "keepOwner", "ofTree")
        FROMDIRECTORY_FIELD_NUMBER: _ClassVar[int]
        KEEPOWNER_FIELD_NUMBER: _ClassVar[int]
        OFTREE_FIELD_NUMBER: _ClassVar[int]
        fromDirectory: bool
        keepOwner: bool
        ofTree: bool
        def __init__(self, fromDirectory: _Optional[bool] = ..., keepOwner: _Optional[bool] = ..., ofTree: _Optional[bool] = ...) -> None: ...
    class Piece(_message.Message):
        __slots__ = ("checksum", "data")
        CHECKSUM_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        checksum: int
        data: bytes
        def __init__(self, checksum: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    EOF_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    header: ResourceChunk.ResourceHeader
    chunk: ResourceChunk.ResourceContents
    eof: ResourceChunk.ResourceEof
    group: ResourceChunk.Group
    piece: ResourceChunk.Piece
    def __init__(self, header: _Optional[_Union[ResourceChunk.ResourceHeader, _Mapping]] = ..., chunk: _Optional[_Union[ResourceChunk.ResourceContents, _Mapping]] = ..., eof: _Optional[_Union[ResourceChunk.ResourceEof, _Mapping]] = ..., group: _Optional[_Union[ResourceChunk.Group, _Mapping]] = ..., piece: _Optional[_Union[ResourceChunk.Piece, _Mapping]] = ...) -> None: ...
