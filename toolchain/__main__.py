"""`python -m toolchain` is `mrecg-onnx`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="mrecg-onnx")
