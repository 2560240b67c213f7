from maskwright.inputs.spark.method import Spark as Spark
