// The transpose of im2col as a gather: every step collects from the windows that read it, in the order of the taps. It asks every tap for its
// window or, where there are fewer, every window for its tap: at most {{ [kernel, windows] | min }} steps, whose sums it adds up in blocks of {{ block }}.
{% include "shared/group" %}
{% include "shared/window" %}

{# The vec4 `col` of tap j of row `line` of the matrix of windows. #}
fn tap(line: u32, j: u32, col: u32) -> vec4<f32> {
{% if channels % 4 == 0 %}
    return x_load(line * x_stride + j * {{ channels // 4 }}u + col);
{% else %}
    let base = line * x_stride + j * {{ channels }}u + 4u * col;
    var v = vec4<f32>();
    for (var lane = 0u; lane < min(4u, {{ channels }}u - 4u * col); lane++) {
        v[lane] = x_at(base + lane);
    }
    return v;
{% endif %}
}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var v = vec4<f32>();
    if (col < {{ used }}u) {
{% if windows < kernel %}
        let sample = row / {{ rows_each }}u * {{ source_each }}u;
        let reach = row % {{ rows_each }}u + {{ offset }}u;
        for (var first = 0u; first < {{ windows }}u; first += {{ block }}u) {
            var part = vec4<f32>();
            for (var n = first; n < min(first + {{ block }}u, {{ windows }}u); n++) {
                // The last window looks at a step with its first taps.
                let window = {{ windows - 1 }}u - n;
                let away = reach - window * {{ divide }}u;
                if (reach >= window * {{ divide }}u && away % {{ dilation }}u == 0u && away / {{ dilation }}u < {{ kernel }}u) {
                    part += tap(sample + window, away / {{ dilation }}u, col);
                }
            }
            v += part;
        }
{% else %}
        let start = origin(row);
{% if kernel <= block %}
        for (var j = 0u; j < {{ kernel }}u; j++) {
            let dy = source(start, j);
            if (dy.inside) {
                v += tap(dy.row, j, col);
            }
        }
{% else %}
        for (var first = 0u; first < {{ kernel }}u; first += {{ block }}u) {
            var part = vec4<f32>();
            for (var j = first; j < min(first + {{ block }}u, {{ kernel }}u); j++) {
                let dy = source(start, j);
                if (dy.inside) {
                    part += tap(dy.row, j, col);
                }
            }
            v += part;
        }
{% endif %}
{% endif %}
    }
    finish(row, col, v);
}
