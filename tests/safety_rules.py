"""What the project's code may not do: each rule is read off the syntax tree."""

import ast
from pathlib import Path

# The one file that reads pickles, with what it may take from the module.
_PICKLES = {"safe_dcp.py": {"pickle.Unpickler", "pickle.UnpicklingError"}}
_PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
_RUNS_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "os.execvp", "runpy.run_path", "runpy.run_module"}
# torch's readers of checkpoints; `safe_dcp.load` is the one of this project.
_READERS = {"dcp.load", "dcp.FileSystemReader", "FileSystemReader", "FsspecReader", "DefaultLoadPlanner"}


def offences(path: Path) -> list[str]:
    """``"line: what"`` of everything in a file that could run code from outside."""
    return [f"{node.lineno}: {what}" for node in ast.walk(ast.parse(path.read_text())) for what in _of(node, path.name)]


def _of(node: ast.AST, file: str):
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for module in modules:
            if module.partition(".")[0] in _PICKLE_MODULES and not (file in _PICKLES and module == "pickle"):
                yield f"import of {module}"
    elif isinstance(node, ast.Attribute):
        name = ast.unparse(node)
        if name.startswith("pickle.") and name not in _PICKLES.get(file, ()):
            yield name
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values):
            if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not _is(value, False):
                yield "trust_remote_code"
    elif isinstance(node, ast.Call):
        yield from _of_call(node, file)


def _of_call(node: ast.Call, file: str):
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    last = name.rpartition(".")[2]
    if name in _RUNS_TEXT or name in _READERS and file not in _PICKLES:
        yield name
    if last == "load" and name.startswith("torch.") and not _is(given.get("weights_only"), True):
        yield f"{name} without weights_only=True"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield name
    for keyword in ("trust_remote_code", "shell", "allow_pickle"):
        if keyword in given and not _is(given[keyword], False):
            yield keyword
    if last == "from_pretrained" and "Model" in name and not _is(given.get("use_safetensors"), True):
        yield f"{name} without use_safetensors=True"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
