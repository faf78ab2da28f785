{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a part: (dict "root" $ "component" "prefill"). Never changes: selectors cannot. */}}
{{- define "baton.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* name, labels and the like: (dict "root" $ "component" "prefill" "name" "the object's") */}}
{{- define "baton.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "baton.labels" . | nindent 2 }}
{{- end -}}

{{- define "baton.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "baton.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* (dict "root" $ "part" .Values.prefill) */}}
{{- define "baton.image" -}}
{{- $image := merge (dict) .part.image .root.Values.image -}}
image: {{ printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) | quote }}
imagePullPolicy: {{ $image.pullPolicy }}
{{- end -}}

{{/* "true" where conductors share a Redis. */}}
{{- define "baton.hasRedis" -}}
{{- if or .Values.redis.enabled .Values.redis.external.url .Values.redis.external.existingSecret -}}true{{- end -}}
{{- end -}}

{{- define "baton.redisSecret" -}}
{{- default (printf "%s-redis" (include "baton.fullname" .)) .Values.redis.existingSecret -}}
{{- end -}}

{{- define "baton.tokenSecret" -}}
{{- default (printf "%s-cluster-token" (include "baton.fullname" .)) .Values.clusterToken.existingSecret -}}
{{- end -}}

{{/* "true" where KEDA says how many there are: (dict "root" $ "component" "prefill"). */}}
{{- define "baton.isScaled" -}}
{{- if and .root.Values.keda.enabled (get .root.Values.keda .component).maxReplicas -}}true{{- end -}}
{{- end -}}

{{/* What a schema cannot say, because it takes two values. */}}
{{- define "baton.check" -}}
{{- include "baton.checkAccess" . -}}
{{- $most := ternary .Values.conductor.autoscaling.maxReplicas .Values.conductor.replicas .Values.conductor.autoscaling.enabled | int -}}
{{- if include "baton.isScaled" (dict "root" $ "component" "conductor") -}}
{{- $most = int .Values.keda.conductor.maxReplicas -}}
{{- if .Values.conductor.autoscaling.enabled -}}
{{- fail "keda.conductor and conductor.autoscaling exclude each other: set one of keda.conductor.maxReplicas and conductor.autoscaling.enabled" -}}
{{- end -}}
{{- end -}}
{{- range $component := list "conductor" "prefill" "decode" -}}
{{- if include "baton.isScaled" (dict "root" $ "component" $component) -}}
{{- $bounds := get $.Values.keda $component -}}
{{- if gt (int $bounds.minReplicas) (int $bounds.maxReplicas) -}}
{{- fail (printf "keda.%s.minReplicas is more than maxReplicas" $component) -}}
{{- end -}}
{{- if and $.Values.elastic.enabled (ne $component "conductor") -}}
{{- fail (printf "keda.%s: elastic workers change their pools themselves, so that a pool's load is not that of its pods" $component) -}}
{{- end -}}
{{- if and (not $.Values.metrics.port) (ne $component "conductor") -}}
{{- fail (printf "keda.%s needs metrics.port" $component) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (gt $most 1) (not (include "baton.hasRedis" .)) -}}
{{- fail "more than one conductor needs Redis: set redis.enabled, redis.external.url or redis.external.existingSecret, or conductor.replicas to 1" -}}
{{- end -}}
{{- $external := .Values.redis.external -}}
{{- if and .Values.redis.enabled (or $external.url $external.existingSecret) -}}
{{- fail "redis.external and redis.enabled exclude each other: set redis.enabled to false" -}}
{{- end -}}
{{- if and $external.url $external.existingSecret -}}
{{- fail "set one of redis.external.url and redis.external.existingSecret" -}}
{{- end -}}
{{- $cache := .Values.modelArtifacts.cache -}}
{{- if and $cache.claimName $cache.hostPath -}}
{{- fail "set one of modelArtifacts.cache.claimName and modelArtifacts.cache.hostPath" -}}
{{- end -}}
{{- $gpu := or (eq .Values.prefill.device "cuda") (eq .Values.decode.device "cuda") -}}
{{- if and .Values.kvstore.enabled $gpu (eq .Values.engine.dtype "auto") -}}
{{- fail "set engine.dtype: auto may mean another type to workers on GPUs than to their stores, which have none" -}}
{{- end -}}
{{- $store := .Values.kvstore.resources -}}
{{- if or (dig "limits" "memory" "" $store) (dig "requests" "memory" "" $store) -}}
{{- fail "kvstore.resources: the memory is kvstore.memory.sizeMiB and overheadMiB" -}}
{{- end -}}
{{- $scaling := .Values.conductor.autoscaling -}}
{{- if and $scaling.enabled (not (dig "requests" "cpu" "" .Values.conductor.resources)) -}}
{{- fail "conductor.autoscaling needs conductor.resources.requests.cpu, which its target is a share of" -}}
{{- end -}}
{{- if and $scaling.enabled (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- fail "conductor.autoscaling.minReplicas is more than maxReplicas" -}}
{{- end -}}
{{- $own := "^--(name|node|host|port|grpc-port|listen|metrics-port|metrics-tls|advertise|conductor|cluster-name|model|model-name|log-level|dtype|block-size|transport|verify|device|store|role|elastic|elastic-settle|memory-mib|memory-name|disk-dir|disk-gib|drain-timeout|tls-cert|tls-key|tls-ca|tls-peer-name|health-port|internal-port|ssl-certfile|ssl-keyfile|tenants|keys|redis-username|redis-password-file|redis-ca-file|redis-cert-file|redis-key-file|otlp-endpoint|trace-sample)(=|$)" -}}
{{- range $component := list "conductor" "prefill" "decode" "kvstore" -}}
{{- range (get $.Values $component).extraArgs -}}
{{- if regexMatch $own . -}}
{{- fail (printf "%s.extraArgs: %s has a value of its own" $component (splitList "=" . | first)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
