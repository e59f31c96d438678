"""TensorRT-LLM as stub modules: the names and parameters of `api_surface.json` and nothing else.

    with stub_modules() as stubs:
        stubs.implement("tensorrt_llm.bindings.executor.Executor", FakeExecutor)
        ...                                  # code that imports tensorrt_llm
        assert stubs.calls_of("tensorrt_llm.bindings.executor.Request")[0]["max_tokens"] == 8

Classes, functions and enums refuse unknown names, missing, unknown and superfluous arguments,
keyword-only arguments given by position and the other way round, and reading or writing attributes
that are not recorded or are read-only. What a call does is the test's business: a call or an
attribute that no test has given a meaning raises StubError.
"""

from __future__ import annotations

import abc
import ast
import contextlib
import enum
import importlib.machinery
import inspect
import json
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

SURFACE_FILE = Path(__file__).with_name("api_surface.json")

Entry = Mapping[str, Any]
"""What the surface says of one class, enum or function."""

Surface = Mapping[str, Mapping[str, Entry]]
"""Module -> name -> entry."""


class StubError(AssertionError):
    """A test asks for something that exists but to which it has given no meaning.

    Not an AttributeError, which `hasattr` and `getattr` with a default would swallow.
    """


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """Stands for a default value of which the surface records the text only."""

    text: str


@dataclass(frozen=True, slots=True)
class StubCall:
    """One call that was accepted."""

    name: str
    """Of a class, a function, or a method as `module.Class.method`."""

    arguments: Mapping[str, Any]
    """As they were given; defaults are not filled in."""


def load_surface() -> Surface:
    """Return the recorded modules."""
    modules: Surface = json.loads(SURFACE_FILE.read_text(encoding="utf-8"))["modules"]
    return modules


class Stubs:
    """The stub modules of one `with` block, what they were called with, and what they do."""

    def __init__(self, surface: Surface) -> None:
        self.surface = surface
        self.modules: dict[str, ModuleType] = {}
        self.calls: list[StubCall] = []
        self._implementations: dict[str, Callable[..., Any]] = {}

    def implement(self, name: str, implementation: Callable[..., Any]) -> None:
        """Say what a class, method or function does.

        A class's implementation is called with the constructor's arguments; the stub's methods
        and attributes are then those of what it returns, as far as that has them. A method's is
        called with the stub and the arguments.

        Raises:
            AttributeError: nothing of that name is recorded.
        """
        self.find(name)
        self._implementations[name] = implementation

    def make(self, name: str, implementation: object = None, /, **attributes: Any) -> Any:
        """Return an instance as the library hands it out, without its constructor.

        Raises:
            AttributeError: the class or one of the attributes is not recorded.
        """
        cls = self.find(name)
        instance = cls.__new__(cls)
        _prepare(instance, implementation)
        for key, value in attributes.items():
            if not isinstance(inspect.getattr_static(cls, key, None), StubAttribute):
                raise AttributeError(f"{name} has no attribute {key!r}")
            instance.stub_values[key] = value
        return instance

    def calls_of(self, name: str) -> list[Mapping[str, Any]]:
        """Return the arguments of every accepted call of a class, method or function.

        Raises:
            AttributeError: nothing of that name is recorded.
        """
        self.find(name)
        return [call.arguments for call in self.calls if call.name == name]

    def find(self, name: str) -> Any:
        """Return the module, class, method or function of a dotted name.

        Raises:
            AttributeError: there is none.
        """
        module = max((m for m in self.modules if f"{name}.".startswith(f"{m}.")), key=len)
        found: Any = self.modules[module]
        for part in name[len(module) + 1 :].split("."):
            found = getattr(found, part) if part else found
        return found

    def implementation_of(self, name: str) -> Callable[..., Any] | None:
        """Return what a test said that `name` does; None if it said nothing."""
        return self._implementations.get(name)

    def accept(
        self, name: str, signatures: _Signatures, args: Any, kwargs: Any
    ) -> inspect.BoundArguments:
        """Record a call and return its arguments by name.

        Raises:
            TypeError: no signature takes these arguments.
        """
        bound = signatures.bind(args, kwargs)
        self.calls.append(StubCall(name, dict(bound.arguments)))
        return bound


@contextlib.contextmanager
def stub_modules(surface: Surface | None = None, *, version: str = "1.2.1") -> Iterator[Stubs]:
    """Put the stub modules into `sys.modules` while the block runs; `version` is what
    `tensorrt_llm.__version__` says."""
    stubs = Stubs(load_surface() if surface is None else surface)
    for name in stubs.surface:
        _add_module(stubs, name)
    for module_name, entries in stubs.surface.items():
        for name, entry in entries.items():
            value = _make(stubs, f"{module_name}.{name}", entry)
            *outer, last = name.split(".")
            setattr(stubs.find(".".join([module_name, *outer])), last, value)
            for other in _other_modules(entry):
                setattr(_add_module(stubs, other), name, value)
    if "tensorrt_llm" in stubs.modules:
        stubs.modules["tensorrt_llm"].__version__ = version  # type: ignore[attr-defined]
    roots = {name.partition(".")[0] for name in stubs.modules}
    displaced = {key: sys.modules.pop(key) for key in list(sys.modules) if _root(key) in roots}
    sys.modules.update(stubs.modules)
    try:
        yield stubs
    finally:
        for key in [key for key in sys.modules if _root(key) in roots]:
            del sys.modules[key]
        sys.modules.update(displaced)


def _root(module: str) -> str:
    return module.partition(".")[0]


def _other_modules(entry: Entry) -> list[str]:
    exported: str | list[str] = entry.get("also_exported_from", [])
    return [exported] if isinstance(exported, str) else exported


def _add_module(stubs: Stubs, name: str) -> ModuleType:
    """Return the stub module of that name, made with the packages around it if need be."""
    if name not in stubs.modules:
        module = ModuleType(name)
        module.__path__ = []  # a package, so that importing what it lacks says so
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        module.__file__ = f"{name.replace('.', '/')}/__init__.py"
        stubs.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(_add_module(stubs, parent), last, module)
    return stubs.modules[name]


def _make(stubs: Stubs, name: str, entry: Entry) -> Any:
    short = name.rpartition(".")[2]
    match entry["kind"]:
        case "enum":
            return enum.Enum(short, entry["values"])
        case "namedtuple":
            return namedtuple(short, [p["name"] for p in entry["params"]])
        case "function":
            return _function(stubs, name, _Signatures(stubs, name, [entry["params"]]))
        case "class":
            return _class(stubs, name, entry)
    raise StubError(f"{name} is of the unknown kind {entry['kind']!r}")


# --- calls --------------------------------------------------------------------------------


class _Signatures:
    """The ways in which something may be called."""

    def __init__(
        self,
        stubs: Stubs,
        name: str,
        overloads: Sequence[Sequence[Mapping[str, Any]]],
        *,
        is_positional_only: bool = False,
    ) -> None:
        self._name = name
        self._overloads: list[inspect.Signature] = []
        for params in overloads:
            for choice in _alternatives(params):
                self._overloads.append(
                    _signature(stubs, name, choice, is_positional_only=is_positional_only)
                )

    def docstring(self, *, takes_self: bool) -> str:
        """Return the signatures as bindings have them in their docstrings, one a line."""
        short = self._name.rpartition(".")[2]
        lines = []
        for signature in self._overloads:
            arguments = str(signature)[1:-1]
            if takes_self:
                arguments = f"self, {arguments}" if arguments else "self"
            lines.append(f"{short}({arguments})")
        return "\n".join(lines)

    def bind(self, args: Any, kwargs: Any) -> inspect.BoundArguments:
        """Return the arguments by name, as the first overload that takes them names them.

        Raises:
            TypeError: none does.
        """
        problems = []
        for signature in self._overloads:
            try:
                return signature.bind(*args, **kwargs)
            except TypeError as error:
                problems.append(f"{self._name}{signature}: {error}")
        raise TypeError("; ".join(problems))


def _alternatives(params: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the parameters, and once more for each that may go by another name."""
    yield list(params)
    for index, param in enumerate(params):
        for name in param.get("alternatives", []):
            other = {"name": name, "required": True}
            yield [*params[:index], other, *params[index + 1 :]]


def _signature(
    stubs: Stubs, name: str, params: Sequence[Mapping[str, Any]], *, is_positional_only: bool
) -> inspect.Signature:
    parameters = []
    for param in params:
        default: Any = inspect.Parameter.empty
        if param.get("var_keyword"):
            kind: Any = inspect.Parameter.VAR_KEYWORD
        else:
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            if is_positional_only:
                kind = inspect.Parameter.POSITIONAL_ONLY
            if param.get("kw_only"):
                kind = inspect.Parameter.KEYWORD_ONLY
            if not param["required"]:
                default = _Default(stubs, name, param.get("default", "None"))
        parameters.append(inspect.Parameter(param["name"], kind, default=default))
    return inspect.Signature(parameters)


@dataclass(frozen=True, slots=True, repr=False)
class _Default:
    """A default value; made when it is needed, because it may be an instance of a later class."""

    stubs: Stubs
    owner: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def value(self) -> Any:
        """Return what the text means: a literal, an enum's member, or an instance; else a text
        or something that stands for what is not recorded."""
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(self.text)
        called = self.text.removesuffix("()")
        module = max((m for m in self.stubs.modules if self.owner.startswith(f"{m}.")), key=len)
        try:
            found = self.stubs.find(f"{module}.{called}")
        except AttributeError:
            is_python = called != self.text or "." in self.text
            return Unrecorded(self.text) if is_python else self.text
        return found() if called != self.text else found


def _function(stubs: Stubs, name: str, signatures: _Signatures) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        stubs.accept(name, signatures, args, kwargs)
        implementation = stubs.implementation_of(name)
        if implementation is None:
            raise StubError(f"{name} was called, but this test does not say what it does")
        return implementation(*args, **kwargs)

    call.__name__ = name.rpartition(".")[2]
    call.__doc__ = signatures.docstring(takes_self=False)
    return call


def _method(stubs: Stubs, name: str, signatures: _Signatures) -> Callable[..., Any]:
    short = name.rpartition(".")[2]

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        stubs.accept(name, signatures, args, kwargs)
        implementation = stubs.implementation_of(name)
        if implementation is not None:
            return implementation(self, *args, **kwargs)
        if hasattr(self.stub_implementation, short):
            return getattr(self.stub_implementation, short)(*args, **kwargs)
        raise StubError(f"{name} was called, but this test does not say what it does")

    call.__name__ = short
    call.__doc__ = signatures.docstring(takes_self=True)
    return call


# --- classes ------------------------------------------------------------------------------


class StubAttribute:
    """A recorded attribute of a stub class. `fset` is None if it is read-only, as a property's."""

    def __init__(self, owner: str, name: str, *, is_writable: bool) -> None:
        self._owner = owner
        self._name = name
        self.fset = self.__set__ if is_writable else None

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if self._name in instance.stub_values:
            return instance.stub_values[self._name]
        if hasattr(instance.stub_implementation, self._name):
            return getattr(instance.stub_implementation, self._name)
        raise StubError(f"{self._owner}.{self._name} was read, but this test gives it no value")

    def __set__(self, instance: Any, value: Any) -> None:
        if self.fset is None:
            raise AttributeError(f"{self._owner}.{self._name} is read-only")
        if hasattr(instance.stub_implementation, self._name):
            setattr(instance.stub_implementation, self._name, value)
        else:
            instance.stub_values[self._name] = value


def _prepare(instance: Any, implementation: object) -> None:
    instance.stub_values = {}
    instance.stub_implementation = implementation


def _class(stubs: Stubs, name: str, entry: Entry) -> type:
    short = name.rpartition(".")[2]
    members: dict[str, Any] = {
        # Without a dictionary, writing an attribute that is not recorded fails.
        "__slots__": ("__weakref__", "stub_implementation", "stub_values"),
        "__init__": _constructor(stubs, name, entry),
        "__module__": name.removesuffix(f".{short}"),
    }
    for attribute in entry["attributes"]:
        is_writable = _is_writable(entry, attribute)
        members[attribute] = StubAttribute(name, attribute, is_writable=is_writable)
    for constant in entry.get("class_attributes", []):
        members[constant] = f"{short}.{constant}"
    for method, method_entry in entry["methods"].items():
        members[method] = _class_method(stubs, f"{name}.{method}", entry, method_entry)
    is_abstract = bool(entry.get("abstract"))
    return abc.ABCMeta(short, (), members) if is_abstract else type(short, (), members)


def _is_writable(entry: Entry, attribute: str) -> bool:
    if "writable" in entry:
        return attribute in entry["writable"]
    readonly = entry.get("readonly", [])
    return readonly != "all" and attribute not in readonly


def _class_method(stubs: Stubs, name: str, entry: Entry, method_entry: Entry) -> Any:
    short = name.rpartition(".")[2]
    overloads = entry.get(f"{short}_overloads", [method_entry["params"]])
    is_positional_only = bool(entry.get("positional_only_methods"))
    signatures = _Signatures(stubs, name, overloads, is_positional_only=is_positional_only)
    if short in [*entry.get("static_methods", []), *entry.get("class_methods", [])]:
        return staticmethod(_function(stubs, name, signatures))
    method = _method(stubs, name, signatures)
    return abc.abstractmethod(method) if short in entry.get("abstract", []) else method


def _constructor(stubs: Stubs, name: str, entry: Entry) -> Callable[..., None]:
    if "params" not in entry:

        def refuse(*_args: Any, **_kwargs: Any) -> None:
            raise TypeError(f"{name} is not recorded as something that Python can construct")

        return refuse
    signatures = _Signatures(
        stubs, f"{name}.__init__", [entry["params"], *entry.get("overloads", [])]
    )

    def construct(self: Any, /, *args: Any, **kwargs: Any) -> None:
        bound = stubs.accept(name, signatures, args, kwargs)
        implementation = stubs.implementation_of(name)
        _prepare(self, implementation(*args, **kwargs) if implementation else None)
        bound.apply_defaults()
        for key, value in bound.arguments.items():
            if key in entry["attributes"]:
                is_default = isinstance(value, _Default)
                self.stub_values[key] = value.value() if is_default else value

    construct.__doc__ = signatures.docstring(takes_self=True)
    return construct
