# The image of head, workers and jobs on Kubernetes (`nafnet cluster manifest`). It has not been built here: there is
# no Docker on the machine that this project is developed on; that its versions agree with constraints.txt is tested.
#
#   docker build -t registry.example.com/nafnet-ray:0.1.0 . && docker push registry.example.com/nafnet-ray:0.1.0
FROM rayproject/ray:2.60.0-py311-gpu
WORKDIR /home/ray/nafnet-ray
# Versions first, the project after: a change of code then builds one small layer, and not torch anew.
COPY --chown=1000:100 constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt "torch>=2.7" mlflow boto3
COPY --chown=1000:100 . .
RUN pip install --no-cache-dir -c constraints.txt ".[cluster]"
# Not in the checkout: packages of the same names would be found there first.
WORKDIR /home/ray
