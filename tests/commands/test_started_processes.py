"""No process is started through a shell, so that nothing a run is given can become a command."""

import ast
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
STARTERS = {"Popen", "run", "call", "check_call", "check_output", "execv", "execve", "execvp"}
THROUGH_A_SHELL = {"system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell"}


def wrong_calls(tree: ast.AST) -> list[str]:
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        shell = any(word.arg == "shell" and getattr(word.value, "value", True) for word in call.keywords)
        one_text = (
            owner == "subprocess" and call.args and isinstance(call.args[0], ast.JoinedStr | ast.Constant | ast.BinOp)
        )
        through = name in THROUGH_A_SHELL and owner in ("os", "subprocess", "asyncio")
        words = call.args[0].elts if call.args and isinstance(call.args[0], ast.List) else ()
        sh = name in STARTERS and any(getattr(word, "value", None) in ("-c", "/bin/sh", "sh", "bash") for word in words)
        if shell or one_text or through or sh:
            found.append(f"line {call.lineno}: {ast.unparse(call)[:80]}")
    return found


def test_processes_are_started_from_lists_of_words():
    found = {}
    for folder in ("bmfm_pipeline", "flows"):
        for file in sorted((TOP / folder).rglob("*.py")):
            if wrong := wrong_calls(ast.parse(file.read_text())):
                found[str(file.relative_to(TOP))] = wrong
    assert not found


def test_the_look_finds_what_it_looks_for():
    for line in (
        "os.system(x)", "subprocess.run(x, shell=True)", "subprocess.run(f'ls {x}')", "subprocess.Popen(['sh', '-c', x])",
        "subprocess.getoutput(x)",
    ):  # fmt: skip
        assert wrong_calls(ast.parse(line)), line
    assert not wrong_calls(ast.parse("subprocess.run(['ls', x], check=True)"))
