"""The help of commands with many options: examples, then the options used most. `--help-all` shows every option."""

TRAIN = """\
usage: remoe train [-h] [OPTIONS]

Train a ReMoE language model. Without options: a small model, in minutes, on
the source code of Python's standard library.

examples:
  remoe train
  remoe train --data my_texts/ --steps 2000
  remoe train --preset mini --num-experts 32 --k 2 --out runs/mine
  remoe train --router topk --seed 1
  remoe train --out runs/mine --resume
  remoe train --from runs/mine --data DATA --lora.rank 16

the model and its data:
  --data PATH             your text, a file or a folder of .txt, .md, .jsonl,
                          .csv, .parquet, ...; or a folder written by `remoe
                          data prepare`
  --from DIR              train the model in this folder further: a run, an
                          export or a converted model
  --preset NAME           size of the model, and defaults of all other options:
                          tiny, mini, 182m, 469m or 978m (default tiny)
  --router NAME           how tokens choose experts: relu, topk, dense and more
                          (default relu)
  --router-options NAME VALUE ...
                          options of the router; docs/routers.md lists them
  --num-experts INT       experts E per layer (default 8)
  --k INT                 target number of active experts per token (default 1)
  --granularity INT       split each expert into this many (default 1)

its training:
  --steps INT             optimiser steps (default 500)
  --batch-size INT        sequences per step (default 16)
  --micro-batch-size INT  sequences at a time; a smaller number, which must
                          divide the batch size, needs less memory
  --seq-len INT           tokens per sequence (default 256)
  --optim.lr FLOAT        peak learning rate (default 0.002)
  --seed INT              seed of weights and of the order of data (default 0)
  --device NAME           auto, cpu, cuda, cuda:N or mps (default auto)
  --recompute             less memory, a third more compute

its run:
  --out DIR               folder of the run; a new one in runs/ by default
  --resume                continue the run in --out, by default the newest
  --config FILE           YAML file with any options; flags take precedence
  --live                  show it in a browser while it trains
  --validate.every INT    steps between validations (default 100)
  --checkpoint.every INT  steps between checkpoints (default 100)

The defaults are those of --preset tiny. All options, also of the groups model,
optim, lora, sparsity, validate and checkpoint: remoe train --help-all"""

COMPARE = """\
usage: remoe compare [-h] [OPTIONS] EXPERIMENT

Train a matrix of runs (routers, seeds, sizes or any other option) from one YAML
file, and compare them at equal tokens and at equal training FLOPs. After an
interruption the same command continues, and repeats nothing.

examples:
  remoe compare mine.yaml --corpus my_texts/
  remoe compare mine.yaml --corpus my_texts/ --workers 2 --base steps 200
  remoe compare mine.yaml --list

EXPERIMENT has `variants` (name: options of `remoe train`) and, if you like,
title, base (options of all), seeds, reference, axes (option: values),
equal_flops and figures. docs/guides/compare.md explains them.

  --corpus PATH           text to prepare: a folder, also one with train/ and
                          validation/, or a file
  --data DIR              folder written by `remoe data prepare`, instead
  --out DIR               folder for tables and figures
                          (by default runs/compare/NAME)
  --pool DIR              folder of the runs, which experiments may share
                          (default runs/pool)
  --base NAME VALUE ...   options that override the experiment's base
  --workers INT           runs to train at the same time (default 1)
  --device NAME           auto, cpu, cuda, cuda:N or mps (default auto)
  --list                  show the runs and their progress; train nothing
  --report-only           tables and figures of the finished runs; train nothing

All options, also of records and zero-shot tasks: remoe compare --help-all"""

PREPARE = """\
usage: remoe data prepare [-h] [OPTIONS] [SOURCE ...]

Convert text into token shards for `remoe train --data DIR`. If the command is
stopped, give it again: it continues where it was.

examples:
  remoe data prepare my_texts/ --out DATA
  remoe data prepare books.jsonl --validation held_out.jsonl --out DATA
  remoe data prepare hf:NAME --out DATA --tokenizer TOKENIZER

SOURCE is a file (.txt, .md, .jsonl, .csv, .parquet, also .gz and .zst), a
folder of them, hf:NAME[:CONFIG[:SPLIT]] for a Hugging Face dataset, or stdlib,
the standard library of the running Python (the default).

  --out DIR               folder for the shards; it must be new or empty
  --validation SOURCE ... text for validation; by default some of the documents
                          are held out
  --validation-fraction FLOAT
                          their share (default 0.02)
  --tokenizer NAME        folder or hub name of a tokenizer; by default a
                          byte-level BPE is trained on the text
  --vocab-size INT        size of that BPE (default 4096)
  --text-column NAME      column or key that contains the text (default text)
  --chat                  JSON lines hold conversations; learn their answers
  --domain-column NAME    column of the domain, such as books (default domain)
  --overwrite             discard an earlier preparation in the folder
  --quiet                 print nothing

All options: remoe data prepare --help-all"""

EVAL = """\
usage: remoe eval [-h] [OPTIONS] RUN

Evaluate a trained model: loss, perplexity, bits per byte and sparsity, overall
and per domain; with --tasks zero-shot accuracy instead.

examples:
  remoe eval runs/mine
  remoe eval runs/mine --sweep-threshold auto
  remoe eval DIR --data DATA
  remoe eval DIR --tasks arc_easy,piqa

RUN is the folder of a run (its newest checkpoint is used), one of its
checkpoints, or a model's folder with its tokenizer.

  --data DIR              folder written by `remoe data prepare` with the
                          model's tokenizer; by default the data of the run
  --split NAME            validation or train (default validation)
  --max-tokens INT        tokens to evaluate; all by default
  --max-experts INT       the most experts that a token may use
  --sweep-threshold LIST  loss and speed as experts with small gates are left
                          out: gate thresholds, or auto
  --quantize SCHEME       int8 or int4 weights; the loss before and after
  --tasks LIST            tasks of the lm-eval harness; needs the extra eval
  --batch-size INT        sequences per forward pass (default 32)
  --json FILE             file to write the figures to

All options: remoe eval --help-all"""

GENERATE = """usage: remoe generate [-h] [OPTIONS] RUN

Generate text with a trained model, which is printed as it is written. The same
seed gives the same text.

examples:
  remoe generate runs/mine --prompt "The cow" --max-new-tokens 40
  remoe generate runs/mine --file prompts.txt --out texts.jsonl
  remoe generate DIR --chat --interactive

RUN is the folder of a run (its newest checkpoint is used), one of its
checkpoints, or the folder of any transformers language model with its
tokenizer. Without --prompt and --file, prompts come from standard input if it
is a pipe or a file, and from a session with you on a terminal.

  --prompt TEXT           text to continue; may be given several times
  --file PATH             file of prompts; - for standard input
  --format NAME           how they are read: auto, lines, jsonl or whole
                          (default auto)
  --batch-size INT        prompts at a time (default 8)
  --out PATH              new JSONL file to write instead of printing
  --chat                  put the prompts as questions to a chat model
  --system TEXT           with --chat: the system message
  --interactive           a session: each line is a prompt
  --max-new-tokens INT    the most tokens to write (default 120)
  --temperature FLOAT     0 takes the most likely token (default 0.8)
  --top-k INT             sample only from the k most likely tokens (default 50)
  --seed INT              the same seed gives the same text (default 0)
  --max-experts INT       the most experts that a token may use

All options: remoe generate --help-all"""

REPORT = """usage: remoe report [-h] [OPTIONS] MODEL [MODEL ...]

Write an HTML page that shows how a model routes: text coloured by expert,
loads, measures and figures; with several models also their differences. The
page is one file that needs no network; open it in a browser.

examples:
  remoe report runs/mine
  remoe report runs/relu runs/topk
  remoe report DIR --prompt "The cow" --generate 100

MODEL is the folder of a run (its newest checkpoint is used), one of its
checkpoints, a model's folder with its tokenizer, also a mixture of transformers
that `remoe convert relufy` knows, or a record of `remoe record`.

  --data DIR              folder written by `remoe data prepare`, or raw text;
                          by default the data of the run
  --prompt TEXT           text to read instead
  --generate INT          tokens that the model writes after the prompt; the
                          page plays how (default 0)
  --out PATH              file to write; by default report.html in MODEL
  --max-tokens INT        tokens for the figures (default 200000)
  --excerpt INT           tokens of each domain shown as text (default 2000)
  --effect-tokens INT     tokens on which each expert is switched off, to
                          measure its effect (default 0)
  --dial-tokens INT       tokens on which gate thresholds and caps are
                          measured (default 0)

All options: remoe report --help-all"""
