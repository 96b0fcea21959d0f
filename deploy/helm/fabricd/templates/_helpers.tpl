{{- define "fabricd.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "fabricd.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "fabricd.small" -}}
requests: {cpu: 5m, memory: 8Mi}
limits: {memory: 64Mi}
{{- end }}

{{- define "fabricd.ownEtcd" -}}
{{- if and (eq .Values.store "etcd") (not .Values.etcd.endpoints) }}yes{{ end }}
{{- end }}

{{/* How etcd is reached: the environment of whoever asks it. */}}
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

{{- define "fabricd.pullSecrets" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A Job can't be changed: an upgrade brings another, and helm removes the one before. */}}
{{- define "fabricd.jobSuffix" -}}
{{- if .Release.IsUpgrade }}-{{ .Release.Revision }}{{ end }}
{{- end }}

{{- define "fabricd.jobPod" -}}
hostNetwork: true
restartPolicy: OnFailure
{{ include "fabricd.pullSecrets" . }}
tolerations: [{operator: Exists}]
{{- end }}

{{/* What makes certificates: fabricd pki, with the right to create Secrets and to read those that it names. */}}
{{- define "fabricd.pkiJob" -}}
{{- $ := .root }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ .name }}
  namespace: {{ $.Release.Namespace }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ .name }}
  namespace: {{ $.Release.Namespace }}
rules:
  - apiGroups: [""]
    resources: [secrets]
    verbs: [create]
  - apiGroups: [""]
    resources: [secrets]
    resourceNames: [{{ join ", " .secrets }}]
    verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .name }}
  namespace: {{ $.Release.Namespace }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ .name }}
    namespace: {{ $.Release.Namespace }}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ .name }}{{ include "fabricd.jobSuffix" $ }}
  namespace: {{ $.Release.Namespace }}
spec:
  backoffLimit: 100
  ttlSecondsAfterFinished: 60
  template:
    metadata:
      labels: {app.kubernetes.io/name: {{ .name }}}
    spec:
      {{- include "fabricd.jobPod" $ | nindent 6 }}
      serviceAccountName: {{ .name }}
      securityContext:
        runAsUser: 65534
        seccompProfile: {type: RuntimeDefault}
      containers:
        - name: pki
          image: {{ include "fabricd.image" $ }}
          {{- template "fabricd.pull" $ }}
          args:
            {{- toYaml .args | nindent 12 }}
          {{- if $.Values.services.enabled }}
          envFrom:
            - configMapRef: {name: fabric-api-server}
          {{- end }}
          securityContext:
            {{- include "fabricd.unprivileged" $ | nindent 12 }}
          resources:
            requests: {cpu: 5m, memory: 16Mi}
            limits: {memory: 64Mi}
{{- end }}
