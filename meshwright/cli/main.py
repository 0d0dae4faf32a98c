"""``meshwright VERB``: parsing, and what becomes of errors.

Exit codes: 0 done; 1 a user error, in one line; 2 no feasible plan, in one line; 3 a mistake of
ours, in one line that says where the traceback is; 130 interrupted. ``--debug``, anywhere, prints
the traceback too.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module

import typer

from meshwright import __version__
from meshwright.errors import PlannerError
from meshwright.strict_json import one_line

__all__ = ["INTERNAL_ERROR", "USER_ERROR", "main"]

USER_ERROR = 1
INTERNAL_ERROR = 3
_INTERRUPTED = 130

_HELP = """Plans, proves and runs distributed training of ordinary PyTorch models.

MODEL is a built-in name, package.module:callable, or a directory with a Hugging Face
configuration. CLUSTER is shorthand (8xh100, cpu:4) or a TOML or YAML file. With --json a verb
prints one JSON document. --debug prints the traceback of an internal error.
"""

_VERBS = {
    "plan": "plan gpt3-175b --cluster 1024xh100 --global-batch 1536 -o plan.json",
    "explain": "explain plan.json",
    "validate": "validate plan.json",
    "run": "run plan.json --steps 10 --verify",
    "fit": "fit --tables ops.parquet collectives.parquet -o my-weights --budget 10m",
    "train": "train -o my-planner",
    "models": "models llama3-8b",
    "clusters": "clusters 2x8xa100-80gb",
    "doctor": "doctor --json",
    "demo": "demo",
}
"""Verb, a function of the same name in the module of the same name, to its example."""

_GROUPS = ("profile", "traces", "records", "bench")
"""Verbs with verbs of their own: ``NAME_app`` in the module of the same name."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meshwright {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    del version  # its callback answers


def _app_for(words: Sequence[str]) -> typer.Typer:
    """The command line as far as ``words`` need it: importing every verb takes half a second."""
    app = typer.Typer(
        help=_HELP,
        epilog="Example: meshwright plan gpt2 --cluster 8xh100 --global-batch 64 -o plan.json",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    wanted = words[0] if words and words[0] in (*_VERBS, *_GROUPS) else None
    for name, example in _VERBS.items():
        if wanted in (None, name):
            verb = getattr(import_module(f"meshwright.cli.{name}"), name)
            app.command(epilog=f"Example: meshwright {example}")(verb)
    for name in _GROUPS:
        if wanted in (None, name):
            group = getattr(import_module(f"meshwright.cli.{name}"), f"{name}_app")
            app.add_typer(group, name=name)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, ``sys.argv`` unless given; the status for the system."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _hush_libraries()
    try:
        status = typer.main.get_command(_app_for(words)).main(
            args=words,
            prog_name="meshwright",
            standalone_mode=False,
        )
    except PlannerError as error:
        _complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (``| head``) has seen enough; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USER_ERROR
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `meshwright records`
            sys.stderr.write(f"{getattr(error, 'format_message')()}\n")  # noqa: B009 - as below
            return USER_ERROR
        if hasattr(error, "format_message"):
            _complain(_usage_error(error))
            return USER_ERROR
        _complain(_internal_error(error, debug=debug))
        return INTERNAL_ERROR
    return status if isinstance(status, int) else 0


def _usage_error(error: Exception) -> str:
    """The one line of a parsing error; typer's own class, whose module changes by version."""
    said = str(getattr(error, "format_message")()).strip()  # noqa: B009 - known by this name only
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "meshwright")
    end = "" if said.endswith((".", "?", ")")) else "."
    return f"{said}{end} See `{command} --help`"


def _internal_error(error: Exception, *, debug: bool) -> str:
    """Write the traceback to a file; the one line about it."""
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix="meshwright-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    if debug:
        sys.stderr.write(text)
    said = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return (
        f"internal error: {type(error).__name__}: {said}; the traceback is in {file.name}; "
        "please report it"
    )


def _complain(text: str) -> None:
    sys.stderr.write(f"meshwright: {one_line(' '.join(text.split()))}\n")


def _hush_libraries() -> None:
    """Keeps warnings and log lines of libraries off the user's screen, in workers too."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    for name, value in (
        ("PYTHONWARNINGS", "ignore"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
