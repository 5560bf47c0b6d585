// Windows of a causal dilated convolution: column j C + c of row (b, t) is x[b, t - (k - 1 - j) dilation, c].
{% include "shared/group" %}

{% if channels % 4 != 0 %}
fn tap(row: u32, column: u32) -> f32 {
    let back = ({{ kernel - 1 }}u - min(column / {{ channels }}u, {{ kernel - 1 }}u)) * {{ dilation }}u;
    if (column >= {{ cols }}u || row % {{ time }}u < back) {
        return 0.0;
    }
    return x_at((row - back) * x_stride + column % {{ channels }}u);
}
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var v = vec4<f32>();
    if (col < {{ used }}u) {
{% if channels % 4 == 0 %}
        let back = ({{ kernel - 1 }}u - col / {{ channels // 4 }}u) * {{ dilation }}u;
        if (row % {{ time }}u >= back) {
            v = x_load((row - back) * x_stride + col % {{ channels // 4 }}u);
        }
{% else %}
        v = vec4<f32>(tap(row, 4u * col), tap(row, 4u * col + 1u), tap(row, 4u * col + 2u), tap(row, 4u * col + 3u));
{% endif %}
    }
    finish(row, col, v);
}
