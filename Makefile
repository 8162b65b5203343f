.PHONY: help demo test slow check format

help:    ## list the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/'

demo:    ## run the main job
	python -m optpipe +recipe=edge_int8

test:    ## run the tests
	python -m pytest -m "not slow" -n auto --dist worksteal

slow:    ## run the proofs that take minutes
	python -m pytest -m slow

check:   ## format, lint and types
	ruff format --check .
	ruff check .
	mypy optpipe stages

format:  ## rewrite the code in the project's format
	ruff format .
	ruff check --fix .
