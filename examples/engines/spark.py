#!/usr/bin/env python3
"""A column of texts to vectors by Spark: spark-submit spark.py MODEL IN.parquet OUT.parquet

IN has the columns id and text, OUT has id, embedding and error; one of the last two is null. A task
keeps one `qemb` from PATH. If it or the Python worker dies, the task fails and Spark runs it again;
only whole tasks are committed. (A bare rdd.pipe("qemb ...") takes what a dead process has printed
for all there is: rows are lost. It needs checkCode=True.)"""
import json
import sys
from itertools import islice
from subprocess import PIPE, Popen
from threading import Thread

import pyarrow
from pyspark.sql import SparkSession

MODEL, SOURCE, TARGET = sys.argv[1:]
QEMB = ["qemb", "-m", MODEL, "--threads=1", "--input=jsonl", "--output=jsonl", "--errors-ok"]
ROW = pyarrow.schema({"id": pyarrow.int64(), "embedding": pyarrow.list_(pyarrow.float32()),
                      "error": pyarrow.struct({"code": pyarrow.string(),
                                               "message": pyarrow.string()})})


def embed(batches):
    with Popen(QEMB, stdin=PIPE, stdout=PIPE, encoding="utf-8") as qemb:
        for batch in batches:
            records = "".join(json.dumps(record) + "\n" for record in batch.to_pylist())
            Thread(target=lambda: print(records, end="", file=qemb.stdin, flush=True)).start()
            answers = [json.loads(answer) for answer in islice(qemb.stdout, len(batch))]
            if len(answers) < len(batch):
                raise RuntimeError(f"qemb: {len(answers)} answers (want {len(batch)})")
            yield pyarrow.RecordBatch.from_pylist(answers, ROW)


TYPES = "id long, embedding array<float>, error struct<code:string,message:string>"
spark = SparkSession.builder.appName("qemb").getOrCreate()
spark.read.parquet(SOURCE).select("id", "text").mapInArrow(embed, TYPES) \
    .write.mode("overwrite").parquet(TARGET)
