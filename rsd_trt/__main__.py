"""`python -m rsd_trt`: the command line."""

from rsd_trt.cli import main

if __name__ == "__main__":
    main(prog_name="rsd-trt")
