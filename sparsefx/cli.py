"""The command line: ``sparsefx audit``, ``export``, ``compact``, ``densify``, ``quantize``, ``prune`` and ``demo``.

Exit status 0 on success, 1 where sparsefx refuses or fails (one line on stderr), 2 for a command line that is wrong.
Model libraries and the ONNX tools are imported by the commands that need them, when they run.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparsefx.errors import CaptureError, OptionError, SparsefxError

if TYPE_CHECKING:
    from sparsefx.report import Audit
    from sparsefx.targets import Target

app = typer.Typer(
    help="Training-time sparsity for PyTorch: audit models, export checked 2:4 ONNX files, see a demo.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="torchvision:resnet50, timm:NAME, transformers:TYPE (bert), transformers:CLASS (BertForMaskedLM), "
        "transformers:path/config.json, package.module:callable (gives a model, or a model and example inputs), or file.onnx",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
InputShapes = Annotated[
    list[str] | None,
    typer.Option("--input-shape", metavar="SHAPE", help="Shape of an input, as 1x3x224x224 or 2x16:int64; once for each input."),
]


def main() -> None:
    """Entry point of the ``sparsefx`` script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        import sparsefx

        typer.echo(f"sparsefx {sparsefx.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Training-time sparsity for PyTorch."""


@app.command()
def audit(
    target: TargetArgument,
    pattern: Annotated[str, typer.Option(help="Which masks are allowed, such as 2:4, 2:4-transposable, unstructured.")] = "2:4",
    density: Annotated[
        float | None, typer.Option(help="Share of weights that participate, where the pattern leaves it free.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML page.", metavar="FILE")] = None,
    input_shape: InputShapes = None,
    no_inputs: Annotated[bool, typer.Option("--no-inputs", help="Look at the modules alone; FLOPs stay unknown.")] = False,
    trtexec_log: Annotated[
        Path | None,
        typer.Option(
            "--trtexec-log", metavar="FILE", help="For file.onnx: what trtexec printed, to show its choices beside ours."
        ),
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="For file.onnx: bytes in each encoding, and with --json every field.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Tell which layers of a model can be sparse, and why the others cannot."""
    with _one_line_errors(debug):
        if target.endswith(".onnx"):
            _audit_onnx(target, as_json, html, trtexec_log, details)
            return
        if trtexec_log is not None or details:
            raise OptionError(f"--trtexec-log and --details are for ONNX files, and {target} is a model; export it first")
        from sparsefx.targets import load_target

        with _busy(f"building {target}"):
            loaded = load_target(target)
        inputs = _inputs(loaded, input_shape, no_inputs)
        report = _audited(loaded, inputs, pattern, density, made_up=not (loaded.inputs_given or input_shape))
        if html is not None:
            report.to_html(html)
            _note(f"wrote {html}")
        if as_json:
            typer.echo(report.to_json())
        else:
            _show(report)


@app.command()
def export(
    target: TargetArgument,
    out: Annotated[Path, typer.Option(help="Where to write the ONNX file.", metavar="FILE")],
    weights: Annotated[
        Path | None, typer.Option(help="A state_dict to load: .safetensors, or .pt as torch.save wrote it.", metavar="FILE")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="Make the weights sparse first, once and by magnitude; otherwise they stay as they are."),
    ] = None,
    input_shape: InputShapes = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset version; the exporter's default where it is left out.")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the first axis of every input free.")] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Store 2:4 weights as values and 4-bit codes; sparsefx densify undoes it.")
    ] = False,
    pad_channels: Annotated[
        bool,
        typer.Option("--pad-channels", help="Pad inputs of 2:4 weights with zeros to multiples of 16 or 4, where that pays."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a model as an ONNX file, checked against onnxruntime."""
    with _one_line_errors(debug):
        import sparsefx
        from sparsefx.targets import load_target
        from sparsefx.weights_file import load_weights

        if target.endswith(".onnx"):
            raise OptionError(f"{target} is an ONNX file already; sparsefx audit {target} tells what it holds")
        with _busy(f"building {target}"):
            # torch.export takes an axis of size 1 for a constant.
            loaded = load_target(target, batch=2 if dynamic_batch else 1, weights_needed=True)
        inputs = _inputs(loaded, input_shape, no_inputs=False)
        if inputs is None:
            raise OptionError(f"no example inputs are known for {target}; pass --input-shape, such as --input-shape 1x3x224x224")
        if weights is not None:
            load_weights(loaded.model, weights)
        if pattern is not None:
            sparsefx.sparsify(loaded.model, pattern=pattern, algorithm="static", example_inputs=inputs)
        with _busy(f"exporting {target} and comparing it with onnxruntime"):
            report = sparsefx.export_onnx(
                loaded.model,
                inputs,
                out,
                dynamic_batch=dynamic_batch,
                opset=opset,
                weights="compact" if compact else "plain",
                pad_channels=pad_channels,
            )
        typer.echo(str(report))


OnnxFile = Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The ONNX file to rewrite.")]
Rewritten = Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write; without it the file itself is replaced.")]


@app.command()
def densify(file: OnnxFile, out: Rewritten = None, debug: Debug = False) -> None:
    """Restore the plain weights of an ONNX file that was exported compact, bit for bit."""
    with _one_line_errors(debug):
        from sparsefx.onnx_files import densify_onnx

        with _busy(f"rewriting {file}"):
            report = densify_onnx(file, out)
        typer.echo(str(report))


@app.command()
def compact(file: OnnxFile, out: Rewritten = None, debug: Debug = False) -> None:
    """Store the 2:4 weights of an ONNX file as values and 4-bit codes, in standard ops; densify undoes it."""
    with _one_line_errors(debug):
        from sparsefx.onnx_files import compact_onnx

        with _busy(f"rewriting {file}"):
            report = compact_onnx(file, out)
        typer.echo(str(report))


@app.command()
def quantize(
    file: OnnxFile,
    calibration: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="Samples like those the model will see: .npz with an array for each input by its name, .npy for "
            "one input, or a folder of these; the first axis counts samples.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the INT8 file.")],
    method: Annotated[str, typer.Option(help="How activation ranges are chosen: minmax, entropy or percentile.")] = "minmax",
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Names of weights to leave in float; once for each glob.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time, where the file leaves its batch free.")] = 32,
    debug: Debug = False,
) -> None:
    """Write a float32 ONNX file in symmetric INT8, zeros and 2:4 kept, and say what it cost in accuracy."""
    with _one_line_errors(debug):
        from sparsefx.onnx_calibration import read_calibration
        from sparsefx.passes.quantize_onnx import check_method, quantize_onnx

        chosen = check_method(method)
        with _busy(f"quantising {file}"):
            batches = read_calibration(calibration, file, batch=batch)
            report = quantize_onnx(file, batches, out, method=chosen, exclude=exclude or ())
        typer.echo(str(report))


@app.command()
def prune(
    target: TargetArgument,
    weights: Annotated[
        Path | None, typer.Option(help="A state_dict to load: .safetensors, or .pt as torch.save wrote it.", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the smaller model's state_dict: .safetensors or .pt.", metavar="FILE")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Where to write the plan (.safetensors), which cuts a fresh model to the same shapes.", metavar="FILE"),
    ] = None,
    multiple: Annotated[
        str, typer.Option(help="Round widths up to multiples of this: a number, or auto for what the machine computes in.")
    ] = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the model before and after, in torch and onnxruntime.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained HTML page.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    input_shape: InputShapes = None,
    debug: Debug = False,
) -> None:
    """Remove empty channels; outputs stay the same, which is checked in float64."""
    with _one_line_errors(debug):
        import sparsefx
        from sparsefx.atomic_file import check_place
        from sparsefx.html import write_text
        from sparsefx.pruning_page import pruning_page
        from sparsefx.pruning_speed import measure_speed, speed_lines
        from sparsefx.targets import load_target
        from sparsefx.weights_file import load_weights, save_weights

        if target.endswith(".onnx"):
            raise OptionError(f"{target} is an ONNX file; prune the torch model that it was exported from, and export it again")
        for place in (out, plan, html):
            if place is not None:
                check_place(place)  # before anything is written anywhere
        with _busy(f"building {target}"):
            loaded = load_target(target, weights_needed=True)
        inputs = _inputs(loaded, input_shape, no_inputs=False)
        if inputs is None:
            raise OptionError(f"no example inputs are known for {target}; pass --input-shape, such as --input-shape 1x3x224x224")
        if weights is not None:
            load_weights(loaded.model, weights)
        with _busy(f"pruning {target}"):
            found = sparsefx.channel_plan(loaded.model, inputs, multiple=int(multiple) if multiple.isdigit() else multiple)
        smaller = sparsefx.apply_channel_plan(loaded.model, found) if out is not None or measure else None
        if out is not None and smaller is not None:
            save_weights(smaller, out)
            _note(f"wrote {out}")
        if plan is not None:
            found.save(plan)
            _note(f"wrote {plan}")
        speed = None
        if measure and smaller is not None:
            with _busy(f"timing {target}"):
                speed = measure_speed(loaded.model, smaller, inputs)
        if html is not None:
            write_text(html, pruning_page(found.report, target, speed))
            _note(f"wrote {html}")
        if as_json:
            typer.echo(json.dumps({**found.report.as_dict(), "measured": None if speed is None else speed.as_dict()}, indent=2))
        else:
            typer.echo("\n".join([str(found.report), *speed_lines(found.report, speed)]))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX file, the report and the figures.", metavar="DIR")] = Path(
        "demo-report"
    ),
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many times to train each net.")] = 3,
    debug: Debug = False,
) -> None:
    """Train a small net dense and 2:4 sparse on handwritten digits, and export the sparse one."""
    with _one_line_errors(debug):
        from sparsefx.demo import run_demo

        run_demo(out, seeds=seeds, say=typer.echo, console=_stderr())


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Errors as one line on stderr and exit status 1; the traceback only on request."""
    if debug:
        yield
        return
    try:
        with warnings.catch_warnings():
            # What the libraries below warn about is no news to who runs a command; --debug shows it.
            warnings.simplefilter("ignore")
            yield
    except SparsefxError as error:
        _fail(str(error))
    except BrokenPipeError:
        # The reader of a pipe has gone, as in `sparsefx audit ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} (unexpected; --debug shows where)")


def _fail(message: str) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(1)


def _note(message: str) -> None:
    typer.echo(message, err=True)


def _stderr() -> Console:
    return Console(stderr=True)


@contextmanager
def _busy(message: str) -> Iterator[None]:
    """A moving sign on stderr while something takes long; nothing where stderr is no terminal.

    What libraries print there meanwhile is dropped: torch.export prints the graph so far when it refuses a model.
    """
    console = Console(file=sys.stderr)
    with console.status(message) if console.is_terminal else nullcontext(), redirect_stderr(io.StringIO()):
        yield


def _show(report: Audit) -> None:
    """As wide as the terminal; the fixed width of ``str()`` where there is none."""
    console = Console()
    if console.is_terminal:
        console.print(report, highlight=False)
    else:
        typer.echo(str(report))


def _inputs(target: Target, shapes: list[str] | None, no_inputs: bool) -> Any:
    if no_inputs:
        if shapes:
            raise OptionError("--input-shape and --no-inputs were both given; leave one out")
        return None
    if not shapes:
        return target.example_inputs
    from sparsefx.targets_inputs import tensors_of_shapes

    return tensors_of_shapes(shapes, target.model)


def _audited(target: Target, inputs: Any, pattern: str, density: float | None, *, made_up: bool) -> Audit:
    import sparsefx

    message = f"auditing {target.name}"
    try:
        with _busy(message):
            return sparsefx.audit(target.model, pattern=pattern, density=density, example_inputs=inputs)
    except CaptureError as error:
        if inputs is None or not made_up:
            raise
        _note(f"note: the model does not run on made-up inputs ({_first_line(error)}); audited without, pass --input-shape")
        with _busy(message):
            return sparsefx.audit(target.model, pattern=pattern, density=density)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _audit_onnx(path: str, as_json: bool, html: Path | None, trtexec_log: Path | None, details: bool) -> None:
    from sparsefx.onnx_audit import audit_onnx
    from sparsefx.onnx_text import as_json_text, as_page, as_table
    from sparsefx.onnx_trtexec import read_log, trtexec_command

    log = None if trtexec_log is None else read_log(trtexec_log)
    with _busy(f"reading {path}"):
        found = audit_onnx(path)
    if html is not None:
        from sparsefx.html import write_text

        write_text(html, as_page(path, found, log=log))
        _note(f"wrote {html}")
    command = f"ask TensorRT itself: {trtexec_command(path, found)}" if found and log is None else ""
    if as_json:
        typer.echo(as_json_text(path, found, log=log, details=details))
        if command:
            _note(command)
    else:
        typer.echo(as_table(path, found, log=log, details=details))
        if command:
            typer.echo(command)
