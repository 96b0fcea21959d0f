{{- define "fabricd.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "fabricd.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "fabricd.ownEtcd" -}}
{{- if and (eq .Values.store "etcd") (not .Values.etcd.endpoints) }}yes{{ end }}
{{- end }}

{{/* The way to etcd: the environment of whoever asks it. */}}
{{- define "fabricd.etcdEnv" -}}
{{- $endpoints := .Values.etcd.endpoints }}
{{- if not $endpoints }}
{{- range $i := until (int .Values.etcd.members) }}
{{- $endpoints = append $endpoints (printf "https://$(FABRIC_ETCD_%d_SERVICE_HOST):12379" $i) }}
{{- end }}
{{- end }}
- {name: FABRICD_ETCD_ENDPOINTS, value: {{ join "," $endpoints | quote }}}
- {name: FABRICD_ETCD_CAFILE, value: /tls/ca.crt}
- {name: FABRICD_ETCD_CERTFILE, value: /tls/tls.crt}
- {name: FABRICD_ETCD_KEYFILE, value: /tls/tls.key}
{{- end }}

{{- define "fabricd.pull" }}
{{- if ne .Values.image.pullPolicy "IfNotPresent" }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}
{{- end }}
