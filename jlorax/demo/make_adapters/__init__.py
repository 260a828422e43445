"""Trains the demo's adapters with PEFT on a CPU, tests them on held-out prompts, saves them.

    python -m jlorax.demo.make_adapters --out DIR [--sentiment-data vaderSentiment-3.3.2.tar.gz]

Needs torch, peft, arrr, vega_datasets and faker. The film ratings are in vaderSentiment's source
distribution (`pip download --no-deps --no-binary :all: vaderSentiment`); without it, all adapters
but `sentiment` are made. Some minutes an adapter on two cores.
"""
