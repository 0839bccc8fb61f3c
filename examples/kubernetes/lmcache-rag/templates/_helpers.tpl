{{- define "lmcache-rag.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "lmcache-rag.labels" -}}
{{ include "lmcache-rag.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "lmcache-rag.selector" -}}
app.kubernetes.io/name: lmcache-rag
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lmcache-rag.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What several pods of this release share: without the same secret none would find what another stored. */}}
{{- define "lmcache-rag.shared" -}}
{{- if or (ne .Values.tier.kind "none") .Values.coordinator.enabled (gt (int .Values.replicas) 1) }}yes{{ end }}
{{- end }}

{{- define "lmcache-rag.check" -}}
{{- if and (include "lmcache-rag.shared" .) (not .Values.secret.name) }}
{{- fail "secret.name is needed with a tier, a coordinator or several replicas: kubectl create secret generic lmcache-rag --from-literal=secret=\"$(openssl rand -hex 32)\"" }}
{{- end }}
{{- if and .Values.coordinator.enabled (eq .Values.tier.kind "none") }}
{{- fail "coordinator.enabled needs a tier: what another replica stored is found, but could not be loaded" }}
{{- end }}
{{- if mod (int .Values.chunkSize) 16 }}
{{- fail "chunkSize is a multiple of vLLM's block, 16" }}
{{- end }}
{{- if and .Values.warm.enabled (not .Values.warm.store.claim) }}{{ fail "warm.enabled needs warm.store.claim" }}{{ end }}
{{- if and .Values.ingest.enabled (not (and .Values.ingest.store.claim .Values.ingest.documents.claim)) }}
{{- fail "ingest.enabled needs ingest.store.claim and ingest.documents.claim" }}
{{- end }}
{{- if and (eq .Values.tier.kind "valkey") (not .Values.tier.valkey.host) }}{{ fail "tier.valkey.host is empty" }}{{ end }}
{{- if and (eq .Values.tier.kind "s3") (not .Values.tier.s3.endpoint) }}{{ fail "tier.s3.endpoint is empty" }}{{ end }}
{{- if and (eq .Values.tier.kind "folder") (not .Values.tier.folder.claim) }}{{ fail "tier.folder.claim is empty" }}{{ end }}
{{- if and (eq .Values.tier.kind "json") (not .Values.tier.json.type) }}{{ fail "tier.json has no type" }}{{ end }}
{{- end }}

{{/* LMCache's JSON of the second tier, as `lmcache-rag serve --l2` writes it. ${NAME} is filled in inside LMCache's process,
so that no password is on a command line. */}}
{{- define "lmcache-rag.tier" -}}
{{- $tier := dict }}
{{- if eq .Values.tier.kind "valkey" }}
{{- $tier = dict "type" "valkey" "startup_nodes" (printf "%s:%d" .Values.tier.valkey.host (int .Values.tier.valkey.port)) "request_timeout" 2.0 }}
{{- if .Values.tier.valkey.password.name }}{{ $_ := set $tier "password" "${TIER_PASSWORD}" }}{{ end }}
{{- else if eq .Values.tier.kind "s3" }}
{{- $tier = dict "type" "s3" "s3_endpoint" .Values.tier.s3.endpoint "s3_region" .Values.tier.s3.region }}
{{- else if eq .Values.tier.kind "folder" }}
{{- $tier = dict "type" "fs" "base_path" "/kv" }}
{{- else }}
{{- $tier = deepCopy .Values.tier.json }}
{{- end }}
{{- if and (has $tier.type (list "fs" "resp" "valkey" "s3")) (not (hasKey $tier "serde")) (not $tier.use_odirect) }}{{ $_ := set $tier "serde" (dict "type" "lmcache_rag" "secret_file" "/run/lmcache-rag/secret") }}{{ end }}
{{- if and .Values.coordinator.enabled (has $tier.type (list "resp" "valkey" "s3")) (not (hasKey $tier "shared")) }}{{ $_ := set $tier "shared" true }}{{ end }}
{{- toJson $tier }}
{{- end }}

{{- define "lmcache-rag.serverModule" -}}
{{- $config := dict }}
{{- if ne .Values.lmcache.index "declared" }}{{ $_ := set $config "index" .Values.lmcache.index }}{{ end }}
{{- if ne .Values.lmcache.store "all" }}{{ $_ := set $config "store" .Values.lmcache.store }}{{ end }}
{{- if ne (int .Values.lmcache.indexSize) 1048576 }}{{ $_ := set $config "index_size" (int .Values.lmcache.indexSize) }}{{ end }}
{{- $module := dict "module_path" "lmcache_rag.connector.server_guard" }}
{{- if $config }}{{ $_ := set $module "config" $config }}{{ end }}
{{- toJson $module }}
{{- end }}

{{- define "lmcache-rag.connector" -}}
{{- $extra := dict "lmcache.mp.host" "tcp://localhost" "lmcache.mp.port" 5555 "lmcache.mp.mq_timeout" 60 "lmcache.mp.heartbeat_interval" 5 "lmcache_rag.policy" "query" "lmcache_rag.ratio" "auto" "lmcache_rag.chunk_size" (int .Values.chunkSize) }}
{{- if ne .Values.lmcache.store "all" }}{{ $_ := set $extra "lmcache_rag.store" .Values.lmcache.store }}{{ end }}
{{- $extra = merge (deepCopy .Values.vllm.connector) $extra }}
{{- if .Values.ingestKey.name }}{{ $_ := set $extra "lmcache_rag.ingest_key_file" "/run/lmcache-rag/ingest-key" }}{{ end }}
{{- dict "kv_connector" "CacheBlendConnector" "kv_connector_module_path" "lmcache_rag.connector.connector" "kv_role" "kv_both" "kv_load_failure_policy" "recompute" "kv_connector_extra_config" $extra | toJson }}
{{- end }}

{{/* A variable from a Secret. */}}
{{- define "lmcache-rag.fromSecret" -}}
- name: {{ .variable }}
  valueFrom:
    secretKeyRef: {name: {{ .secret.name | quote }}, key: {{ .secret.key | quote }}}
{{- end }}

{{/* Everything that is written goes to /cache or /tmp: the image itself is read-only. */}}
{{- define "lmcache-rag.folders" -}}
- {name: HOME, value: /cache/home}
- {name: HF_HOME, value: /cache/huggingface}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: XDG_CACHE_HOME, value: /cache/xdg}
- {name: LMCACHE_RAG_CACHE, value: /cache/lmcache-rag}
- {name: LMCACHE_RAG_STATE, value: /cache/state}
{{- end }}
